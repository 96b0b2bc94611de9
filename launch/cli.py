"""The command line `nd`. Parses words, calls ``launch.commands.launching``, turns errors into messages and exit codes.

Heavy imports stay inside the commands: `nd --help` answers at once.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launch.plans.choose import LaunchOptions

app = typer.Typer(
    name="nd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distributed NeuralDiffuser: reconstruct seen pictures from fMRI.\n\n"
    "phantom -> pack -> train -> evaluate -> report; `nd demo` runs the whole line on made-up data.",
)

Recipe = Annotated[str, typer.Argument(help="Recipe: a name (demo, paper) or the path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value overrides, e.g. shards_dir=shards sampler.kappa=1e5.")
]
Ranks = Annotated[int | None, typer.Option("--ranks", min=1, help="Ranks to start (default: one per GPU, or one).")]
Hostfile = Annotated[Path | None, typer.Option("--hostfile", help="DeepSpeed hostfile: lines of `NAME slots=N`.")]
LauncherName = Annotated[
    str,
    typer.Option(
        "--launcher",
        help="auto, local, srun; train: deepspeed-pdsh, deepspeed-openmpi, deepspeed-mpich; the others: mpirun.",
    ),
]
Include = Annotated[
    str, typer.Option("--include", help="Use only these hosts and slots: NAME or NAME:SLOT,SLOT, joined by @.")
]
Exclude = Annotated[str, typer.Option("--exclude", help="Leave these hosts and slots out (same form).")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print configuration, hosts and the exact command; run nothing.")
]


def _version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from nd_dist import __version__

        typer.echo(f"nd_dist {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `nd` itself."""


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of a launch, e.g. launch.interface=ib0.")
    ] = None,
    hostfile: Hostfile = None,
    shared: Annotated[
        Path, typer.Option("--shared", help="With --hostfile: a folder that all hosts must see.")
    ] = Path(),
) -> None:
    """Say what is installed, what is missing, and the command that installs it; with --hostfile on every host."""
    from rich.console import Console

    from launch.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(hostfile, shared, Console(), overrides or []))


@app.command()
def phantom(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write; becomes nsd_root.")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe whose `phantom` section is used.")] = "demo",
) -> None:
    """Write a small made-up NSD in NSD's own files and layout."""
    from launch.commands.demo import make_phantom

    make_phantom(recipe, [*(overrides or []), f"nsd_root={out_dir}"])


@app.command()
def pack(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
    include: Include = "",
    exclude: Exclude = "",
    dry_run: DryRun = False,
) -> None:
    """Pack NSD into WebDataset shards with MPI ranks: trials, targets, pictures, index."""
    from launch.plans.choose import LaunchOptions

    _launch("pack", recipe, overrides, LaunchOptions(ranks, hostfile, launcher, include, exclude), dry_run)


@app.command()
def verify(
    shards_dir: Annotated[str, typer.Argument(help="Folder of packed shards, or a URL of a copy (http, https, s3).")],
    overrides: Overrides = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Pack again what is damaged, with the recipe that the folder keeps."),
    ] = False,
) -> None:
    """Re-hash every shard and check the index against it; name what is wrong."""
    from launch.commands.packed_shards import run_repair, run_verify
    from nd_dist.errors import ConfigError

    if overrides and not repair:
        raise ConfigError("Only a repair takes key=value words.", found=" ".join(overrides), todo="add --repair")
    run_repair(Path(shards_dir), overrides or []) if repair else run_verify(shards_dir)


@app.command()
def export(
    shards_dir: Annotated[str, typer.Argument(help="Folder of packed shards, or a URL of a copy (http, https, s3).")],
    out_dir: Annotated[Path, typer.Argument(help="New folder for files in MindEye2's published layout.")],
    subjects: Annotated[list[int] | None, typer.Option("--subject", help="Only these subjects; repeat it.")] = None,
) -> None:
    """Write packed shards back as MindEye2's published files: betas, behaviour tars, pictures."""
    from launch.commands.packed_shards import run_export

    run_export(shards_dir, out_dir, subjects)


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
    include: Include = "",
    exclude: Exclude = "",
    dry_run: DryRun = False,
    stages: Annotated[str, typer.Option("--stages", help="Stages to train, e.g. 1,2 (default: the recipe's).")] = "",
    subjects: Annotated[
        str, typer.Option("--subjects", help="Train the whole grid for these target subjects, e.g. 1,2,5,7.")
    ] = "",
    all_targets: Annotated[
        bool,
        typer.Option("--all-targets", help="Train the whole grid, every target (heads=single: a network each)."),
    ] = False,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Trainings of the grid at a time on a host.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a torch profiler trace of some steps.")] = False,
) -> None:
    """Train voxel encoders, backbone and heads with DeepSpeed, stage 1 and stage 2; resumes by itself."""
    from launch.plans.choose import LaunchOptions

    words = [*(overrides or []), *(["training.profile=true"] if profile else [])]
    if not (all_targets or subjects):
        words += [f"training.stages=[{stages}]"] if stages else []
        _launch("train", recipe, words, LaunchOptions(ranks, hostfile, launcher, include, exclude), dry_run)
        return
    from launch.grid.plan import GridRequest, numbers
    from launch.grid.run import grid_command
    from launch.recipe import load_recipe

    request = GridRequest(
        numbers(subjects, "--subjects"), numbers(stages, "--stages"), all_targets, ranks or 1, at_once
    )
    grid_command(load_recipe(recipe, words), request, hostfile, dry_run)


@app.command()
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
    include: Include = "",
    exclude: Exclude = "",
    dry_run: DryRun = False,
) -> None:
    """Reconstruct the test images with and without guidance over MPI ranks, and score them."""
    from launch.plans.choose import LaunchOptions

    _launch("evaluate", recipe, overrides, LaunchOptions(ranks, hostfile, launcher, include, exclude), dry_run)


@app.command()
def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
    include: Include = "",
    exclude: Exclude = "",
    dry_run: DryRun = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time a few units, print what the sweep costs, and stop.")
    ] = False,
) -> None:
    """Choose a point of the grid on held-out training images, and score the grid on the test images."""
    from launch.plans.choose import LaunchOptions

    command = "estimate" if estimate else "sweep"
    _launch(command, recipe, overrides, LaunchOptions(ranks, hostfile, launcher, include, exclude), dry_run)


@app.command()
def submit(
    command: Annotated[
        str, typer.Argument(help="pack, train, evaluate or sweep; several joined by commas run one after the other.")
    ],
    recipe: Recipe,
    overrides: Overrides = None,
    array: Annotated[
        bool, typer.Option("--array", help="sweep: one job of the array for each point of the grid.")
    ] = False,
    all_targets: Annotated[
        bool, typer.Option("--all-targets", help="train: the whole grid of trainings, an array for each stage.")
    ] = False,
    subjects: Annotated[str, typer.Option("--subjects", help="Target subjects of the grid, e.g. 1,2,5,7.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit nothing.")] = False,
) -> None:
    """Submit commands to Slurm with sbatch; resources come from the recipe's `slurm` section."""
    from rich.console import Console

    from launch.commands.submit import submit_command
    from launch.grid.plan import GridRequest, numbers
    from launch.recipe import load_recipe

    chosen = numbers(subjects, "--subjects")
    grid = GridRequest(chosen, all_targets=all_targets) if all_targets or chosen else None
    submit_command(command, load_recipe(recipe, overrides or []), array, grid, dry_run, Console(soft_wrap=True))


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Say where a run stands: stage, step, speed, hosts, last error, age of the last event."""
    from launch.commands.status import print_status

    print_status(run_dir)


@app.command()
def merge(
    out_dir: Annotated[Path, typer.Argument(help="Run folder to write; may not hold metrics yet.")],
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders with metrics.json, of one protocol.")],
) -> None:
    """Join the points of several runs (two sweeps, one run per subject) into one table and report."""
    from launch.commands.results import run_merge

    run_merge(out_dir, run_dirs)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run that has metrics.json.")],
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also log to tensorboard or wandb (extra `track`); repeatable.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Also write strip.png, grid.png and table.md into this folder.")
    ] = None,
) -> None:
    """Write report.html of a run: one page with tables, pictures and provenance."""
    from launch.commands.results import run_report

    run_report(run_dir, track or [], figures)


@app.command()
def demo(
    overrides: Overrides = None,
    ranks: Ranks = 2,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe to run.")] = "demo",
    full: Annotated[
        bool, typer.Option("--full", help="The recipe demo_full: a larger world, about half an hour.")
    ] = False,
) -> None:
    """Run the whole line on a phantom NSD: phantom, pack, verify, train, evaluate, sweep, report."""
    from launch.commands.demo import run_demo

    run_demo("demo_full" if full else recipe, overrides or [], ranks)


@app.command()
def conformance(
    directory: Annotated[Path, typer.Argument(help="Folder of reference cases (layout: docs/conformance.md).")],
) -> None:
    """Compare this implementation with reference cases of the released code; exit 0 only if all hold."""
    from launch.commands.results import run_conformance_table

    raise typer.Exit(run_conformance_table(directory))


def _launch(command: str, recipe: str, overrides: list[str] | None, options: LaunchOptions, dry_run: bool) -> None:
    """Start a launching command, or show what it would start."""
    from launch.commands.dry_run import dry_run_command
    from launch.commands.launching import launch_command
    from launch.recipe import load_recipe

    config = load_recipe(recipe, overrides or [])
    if dry_run:
        dry_run_command(command, config, options)
    else:
        launch_command(command, config, options)


def main() -> None:
    """Run `nd`."""
    guarded(app)


def guarded(program: Callable[[], object]) -> None:
    """Run a program: the other place (beside the rank boundary) where errors are caught; they become exit codes."""
    from nd_dist.errors import NdDistError

    try:
        program()
    except NdDistError as error:
        _complain(type(error).__name__, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("Interrupted", "Stopped; run the same command again to go on.")
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug is reported, with its traceback on disk
        _complain("Unexpected error", f"{type(error).__name__}: {error}\n  traceback: {_write_traceback()}")
        sys.exit(1)


def _write_traceback() -> str:
    """Write the traceback of the current exception to a new file and return its path."""
    with tempfile.NamedTemporaryFile("w", prefix="nd-traceback-", suffix=".txt", delete=False) as stream:
        traceback.print_exc(file=stream)
    return stream.name


def _complain(title: str, message: str) -> None:
    """Write an error to the terminal's standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text(f"{title}: ", style="bold red") + Text(message))


if __name__ == "__main__":
    main()
