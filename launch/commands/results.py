"""What the commands about finished runs do: report, merge, conformance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from launch.console import make_console
from nd_dist.errors import ConfigError

if TYPE_CHECKING:
    from nd_dist.conformance import Row


def print_splits(run_dirs: Sequence[Path]) -> None:
    """Print the main point of runs on several splits under each other, with differences to the first."""
    from nd_dist.report.generalisation import split_table

    found = split_table(run_dirs)
    table = Table(title=found.title, title_justify="left")
    for heading in ("split", *(f"{metric.label} {metric.arrow}" for metric in found.metrics)):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        table.add_row(row.label, *(f"{value}\n{small}" if small else value for value, small, _ in row.cells))
    make_console().print(table, soft_wrap=False)


def run_report(
    run_dir: Path,
    trackers: Sequence[str] = (),
    figures_dir: Path | None = None,
    beside: Path | None = None,
    is_partial: bool = False,
) -> None:
    """Write the report of a run and print where it is; log its numbers where trackers are named.

    Args:
        run_dir: Folder of an evaluated run.
        trackers: ``tensorboard`` or ``wandb``.
        figures_dir: Where pictures and table of the run go as files of their own; none: nowhere.
        beside: Another run to stand beside it.
        is_partial: Report what is there of a run that goes on, and nothing else.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    from nd_dist.report.figures import write_figures
    from nd_dist.report.report import write_report
    from nd_dist.report.tracking import TRACKERS, log_run

    if unknown := sorted(set(trackers) - set(TRACKERS)):
        raise ConfigError("Unknown tracker.", where=", ".join(unknown), expected=" or ".join(TRACKERS))
    console = make_console()
    if is_partial:
        from launch.recipe import load_recipe
        from nd_dist.evaluation.partial import partial_metrics

        found = partial_metrics(load_recipe(str(run_dir / "config.yaml"), [f"run_dir={run_dir}"]))
        console.print(f"  report: {write_report(run_dir, beside, found)}")
        return
    console.print(f"  report: {write_report(run_dir, beside)}")
    if figures_dir is not None:
        for path in write_figures(run_dir, figures_dir):
            console.print(f"  figure: {path}")
    for tracker in trackers:
        console.print(f"  {tracker}: {log_run(run_dir, tracker)}")


def run_conformance_table(directory: Path) -> int:
    """Run every reference case of a folder, print the table; return 0 only if all hold."""
    from nd_dist.conformance import run_conformance

    rows = run_conformance(directory)
    make_console().print(_conformance_table(rows), soft_wrap=False)
    return 0 if all(row.ok for row in rows) else 1


def run_merge(out_dir: Path, run_dirs: Sequence[Path]) -> None:
    """Join evaluated runs into one run folder and write its report."""
    from nd_dist.evaluation.merge import merge_runs

    console = make_console()
    console.print(f"  merge: {merge_runs(out_dir, run_dirs)} point(s) -> {out_dir / 'metrics.json'}")
    run_report(out_dir)


def _conformance_table(rows: Sequence[Row]) -> Table:
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
        mark = Text("--", "yellow") if row.is_remark else Text("ok", "green") if row.ok else Text("FAILS", "red")
        error, tolerance = ("", "") if math.isnan(row.tolerance) else (f"{row.error:.1e}", f"{row.tolerance:.0e}")
        table.add_row(row.case_file, row.quantity, error, tolerance, mark, row.note)
    return table
