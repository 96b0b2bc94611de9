"""Where commands write, and how they line up columns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

_UNLIMITED = 10_000


def make_console() -> Console:
    """Return the console of a command: texts are written as they are.

    A terminal breaks long lines; in a file or pipe every line and every row of a table is one line, for grep.
    """
    width = None if sys.stdout.isatty() else _UNLIMITED
    return Console(width=width, soft_wrap=True, markup=False, highlight=False, emoji=False)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many words as lines, with the words of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(f"  {line}" for line in lines)
