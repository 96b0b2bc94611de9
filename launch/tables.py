"""Tables that `nd` prints. Rendering only: what a row means is said where the row is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from nd_dist.conformance import Row


def conformance_table(rows: Sequence[Row]) -> Table:
    """Return one line for each case and quantity: relative error, tolerance, and whether it holds."""
    failed = sum(not row.ok for row in rows)
    title = f"conformance: {len(rows) - failed} of {len(rows)} quantities hold"
    table = Table(title=title, title_justify="left")
    for heading, justify in (("case", "left"), ("quantity", "left"), ("error", "right"), ("tolerance", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("")
    table.add_column("note", overflow="fold")
    for row in rows:
        mark = "[green]ok[/]" if row.ok else "[red]FAILS[/]"
        table.add_row(row.case_file, row.quantity, f"{row.error:.1e}", f"{row.tolerance:.0e}", mark, row.note)
    return table
