"""The templates of ``page/``, filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

SUFFIX = ".j2"


@cache
def _texts() -> dict[str, str]:
    folder = resources.files("nd_dist.report").joinpath("page")
    return {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir() if item.name.endswith(SUFFIX)}


def filled(
    name: str,
    marks: Mapping[str, str] | None = None,
    filters: Mapping[str, Callable[[str], str]] | None = None,
    **values: Any,  # whatever a template shows
) -> str:
    """Return a template with its values; where it is HTML, they are escaped.

    Args:
        name: File that it makes.
        marks: Other marks than Jinja's own.
        filters: Filters of its own.
        values: What it shows.
    """
    environment = Environment(
        loader=DictLoader(_texts()),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not name.endswith(".html"),
        **(marks or {}),  # type: ignore[arg-type]
    )
    environment.filters |= filters or {}
    return environment.get_template(name + SUFFIX).render(**values)
