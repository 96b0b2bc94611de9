"""Tables that `nd` prints. Rendering only: what a row means is said where the row is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from nd_dist.conformance import Row


def conformance_table(rows: Sequence[Row]) -> Table:
    """Return one line for each case and quantity: relative error, tolerance, and whether it holds."""
    remarks = sum(row.is_remark for row in rows)
    held = sum(row.ok for row in rows) - remarks
    title = f"conformance: {held} of {len(rows) - remarks} quantities hold"
    table = Table(title=f"{title}, {remarks} remarks on what was not checked" if remarks else title)
    table.title_justify = "left"
    for heading, justify in (("case", "left"), ("quantity", "left"), ("error", "right"), ("tolerance", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("")
    table.add_column("note", overflow="fold")
    for row in rows:
        mark = "[yellow]--[/]" if row.is_remark else "[green]ok[/]" if row.ok else "[red]FAILS[/]"
        error, tolerance = ("", "") if math.isnan(row.tolerance) else (f"{row.error:.1e}", f"{row.tolerance:.0e}")
        table.add_row(row.case_file, row.quantity, error, tolerance, mark, escape(row.note))
    return table
