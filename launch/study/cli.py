"""The commands `nd study`. Parses words; heavy imports stay inside the commands."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from launch.options import DryRun, Hostfile, LauncherName, Overrides, Ranks, command_of
from launch.study import STUDIES_DIR

study_app = typer.Typer(no_args_is_help=True, help="A whole paper as one file: plan, run, status, report.")
_command = partial(command_of, study_app)


def studies_like(incomplete: str) -> list[str]:
    """Return the names of studies that begin with a text; a shell offers files where there are none."""
    return [path.stem for path in sorted(STUDIES_DIR.glob(f"{incomplete}*.yaml"))]


StudyName = Annotated[
    str, typer.Argument(help="Study: paper, phantom, or the path of a YAML file.", autocompletion=studies_like)
]


@_command("nd study plan paper --gpu h100 --gpus 8", "nd study plan phantom")
def plan(
    study: StudyName,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU: h100, h200, a100, l40s.")] = "h100",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many of them share the work.")] = 8,
) -> None:
    """Say what a study takes in hours, memory, disk and files; needs no data, network or GPU, and starts nothing."""
    from launch.study.costs import print_costs
    from launch.study.study import load_study

    print_costs(load_study(study, overrides or []), gpu, gpus)


@_command("nd study run phantom --ranks 2", "nd study run paper seeds=[42,43] --submit")
def run(
    study: StudyName,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
    stage: Annotated[str, typer.Option("--stage", help="Only this stage (`nd study status` names them).")] = "",
    to_slurm: Annotated[bool, typer.Option("--submit", help="As jobs of Slurm that wait for each other.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Do what is not done of a study, here, over a hostfile's hosts or as jobs of Slurm; the same command goes on."""
    from launch.plans.choose import LaunchOptions
    from launch.study.run import run_study, study_status
    from launch.study.study import load_study
    from launch.study.submit import submit_study

    found = load_study(study, overrides or [])
    if to_slurm:
        submit_study(found, dry_run)
    elif dry_run:
        study_status(found)
    else:
        run_study(found, LaunchOptions(ranks, hostfile, launcher), stage)


@_command("nd study status phantom")
def status(study: StudyName, overrides: Overrides = None) -> None:
    """Say how every stage of a study stands."""
    from launch.study.run import study_status
    from launch.study.study import load_study

    study_status(load_study(study, overrides or []))


@_command("nd study report phantom")
def report(study: StudyName, overrides: Overrides = None) -> None:
    """Write a study's tables (HTML, CSV, Markdown, LaTeX) from what is evaluated by now; the rest is "not run"."""
    from launch.study.report import report_study
    from launch.study.study import load_study

    report_study(load_study(study, overrides or []))
