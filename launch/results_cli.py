"""The commands about finished runs, and about the code itself. Parses words and calls ``launch.commands.results``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.options import command_of

results_app = typer.Typer()
_command = partial(command_of, results_app)


@_command("nd merge runs/all runs/subj01 runs/subj02")
def merge(
    out_dir: Annotated[Path, typer.Argument(help="Run folder to write; must not contain metrics yet.")],
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders with metrics.json, of one protocol.")],
) -> None:
    """Combine several runs (two sweeps, one run per subject) in one table and report."""
    from launch.commands.results import run_merge

    run_merge(out_dir, run_dirs)


@_command("nd splits runs/random runs/cluster runs/ood")
def splits(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="Evaluated runs, one per data.split; the first is the baseline.")
    ],
) -> None:
    """Print the main numbers of runs on several splits, and their differences from the first."""
    from launch.commands.results import print_splits

    print_splits(run_dirs)


@_command("nd report runs/subj01 --figures figures --track tensorboard")
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run that has metrics.json.")],
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also log to tensorboard or wandb (extra `track`); repeatable.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Also write strip.png, grid.png and table.md to this folder.")
    ] = None,
    beside: Annotated[Path | None, typer.Option("--beside", help="Another run to compare with.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Report the results so far of a run in progress.")
    ] = False,
) -> None:
    """Write a run's report.html: a single page with tables, pictures and provenance."""
    from launch.commands.results import run_report

    run_report(run_dir, track or [], figures, beside, partial)


@_command("nd conformance reference_cases")
def conformance(
    directory: Annotated[Path, typer.Argument(help="Folder of reference cases (layout: docs/conformance.md).")],
) -> None:
    """Compare this implementation with reference cases from the released code; exit 0 only if all match."""
    from launch.commands.results import run_conformance_table

    raise typer.Exit(run_conformance_table(directory))
