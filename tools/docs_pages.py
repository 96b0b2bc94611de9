"""Pages of the site that are made when it is built: files of the repository's root, and references from the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from launch.cli import app
from launch.keys import Setting, settings_of
from nd_dist.config import Config

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSES.md": "licences.md",
}
FILES = ("LICENSE", "CITATION.cff")
"""Files of the root that the pages link to."""
_LINK = re.compile(r"\]\((?:\.\./)?(docs/)?([\w./-]+)(#[\w-]+)?\)")


def on_files(files: Any, config: Any) -> Any:  # Any: mkdocs ships no types
    """Add the pages; mkdocs calls this with the files that it has found."""
    from mkdocs.structure.files import File

    made = {page: linked((ROOT / name).read_text(encoding="utf-8")) for name, page in FROM_ROOT.items()}
    made["settings.md"] = settings_page()
    made["commands.md"] = commands_page()
    made |= {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def linked(text: str) -> str:
    """Return a page of the root with links as they are on the site."""
    return _LINK.sub(lambda link: f"]({FROM_ROOT.get(link[2], link[2])}{link[3] or ''})", text)


def settings_page() -> str:
    """Return every setting of a recipe, a table per section."""
    parts = [
        "# Settings",
        "Every setting of a recipe. Set them in a YAML file, or on the command line as `key=value`. "
        "`nd config keys WORD` searches this list, `nd config schema` prints a JSON schema for editors.",
    ]
    for section, settings in groupby(settings_of(), key=lambda each: each.key.rpartition(".")[0]):
        if section:
            kind = type(getattr(Config(), section))
            parts += [f"## {section}", str(kind.__doc__)]
        else:
            parts.append("## General")
        parts.append("\n".join(_rows(settings)))
    return "\n\n".join(parts) + "\n"


def _rows(settings: Iterator[Setting]) -> Iterator[str]:
    yield "| setting | type | default | meaning |"
    yield "|---|---|---|---|"
    for each in settings:
        cells = (f"`{each.key}`", each.kind, f"`{each.default}`", each.meaning)
        yield f"| {' | '.join(cell.replace('|', '&#124;') if '`' not in cell else cell for cell in cells)} |"


def commands_page() -> str:
    """Return every command with its arguments and options, as ``--help`` says them."""
    command = get_command(app)
    return str(get_docs_for_click(obj=command, ctx=typer.Context(command), name="nd", title="Commands"))
