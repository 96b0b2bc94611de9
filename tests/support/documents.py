"""The programs of the documentation, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def programs(page: str) -> dict[str, str]:
    """Return name -> text of a page's programs: the Python blocks that begin with a comment that names a file."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    named = {block: re.match(r"# ([\w./]+\.py)", block) for block in blocks}
    return {match[1]: block for block, match in named.items() if match}


def commands(page: str) -> str:
    """Return the only shell script of a page."""
    [script] = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(script)
