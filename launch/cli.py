"""The command line `nd`. Parses words and calls ``launch.commands``.

Heavy imports stay inside the commands: `nd --help` answers at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.boundary import guarded
from launch.config_cli import config_app
from launch.options import (
    AllTargets,
    Hostfile,
    LauncherName,
    LaunchWords,
    Overrides,
    Ranks,
    Recipe,
    RecipeOption,
    RunDir,
    Subjects,
    Submitted,
    command_of,
    launching,
)
from launch.results_cli import results_app
from launch.study.cli import study_app

app = typer.Typer(
    name="nd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distributed NeuralDiffuser: reconstruct seen pictures from fMRI.\n\n"
    "phantom -> pack -> train -> evaluate -> report; `nd demo` runs the whole pipeline on simulated data.",
)
app.add_typer(results_app)
app.add_typer(config_app, name="config")
app.add_typer(study_app, name="study")
_command = partial(command_of, app)


def _version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from nd_dist import __version__

        typer.echo(f"nd_dist {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of `nd` itself."""


@_command(
    "nd doctor", "nd doctor paper nsd_root=nsd shards_dir=shards", "nd doctor --hostfile hosts --shared /scratch/me"
)
def doctor(
    words: Annotated[
        list[str] | None, typer.Argument(help="A recipe to check as well, and key=value settings.")
    ] = None,
    hostfile: Hostfile = None,
    shared: Annotated[Path, typer.Option("--shared", help="A folder that must be visible on all hosts.")] = Path(),
) -> None:
    """Check what is installed and what a run would be missing, and suggest fixes; with --hostfile, on every host."""
    from launch.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(hostfile, shared, words or []))


@_command("nd phantom demo/nsd phantom.num_subjects=2", "nd phantom laion --layout laion-fmri")
def phantom(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write, used as nsd_root.")],
    overrides: Overrides = None,
    recipe: RecipeOption = "demo",
    layout: Annotated[str, typer.Option("--layout", help="nsd or laion-fmri (default: the recipe's).")] = "",
) -> None:
    """Write a small simulated data set in NSD's file layout, or in LAION-fMRI's."""
    from launch.commands.demo import make_phantom

    more = [f"phantom.layout={layout}"] if layout else []
    make_phantom(recipe, [*(overrides or []), *more, f"nsd_root={out_dir}"])


@_command("nd fetch models --dry-run", "nd fetch judges --to judges", "nd fetch nsd --to nsd --subjects 1,2")
def fetch(
    what: Annotated[str, typer.Argument(help="models, judges or captions; nsd or laion-fmri print commands.")],
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to download into (models default to the Hugging Face cache).")
    ] = None,
    recipe: RecipeOption = "",
    subjects: Annotated[
        str, typer.Option("--subjects", help="For data sets: only these subjects, e.g. 1,2,5,7.")
    ] = "",
    mirror: Annotated[str, typer.Option("--mirror", help="Server to use instead of the original ones.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be downloaded.")] = False,
) -> None:
    """Download models, metric networks or captions; print the commands that download a data set."""
    from launch.commands.fetch import fetch_command, make_fetcher, recipe_of
    from launch.grid.plan import numbers
    from launch.recipe import load_recipe

    config = load_recipe(recipe or recipe_of(what), overrides or [])
    fetch_command(what, to, make_fetcher(mirror, dry_run), config, numbers(subjects, "--subjects"))


@_command("nd pack paper nsd_root=nsd shards_dir=shards --hostfile hosts --dry-run")
@launching
def pack(words: LaunchWords) -> None:
    """Pack a data set into WebDataset shards (trials, targets, pictures, index), on MPI ranks."""
    words.launch("pack")


@_command(
    "nd verify shards",
    "nd verify shards --repair nsd_root=/data/nsd",
    "nd verify --source laion_fmri nsd_root=/data/laion_fmri",
)
def verify(
    shards_dir: Annotated[str, typer.Argument(help="Folder or URL of packed shards; with --source a recipe.")],
    overrides: Overrides = None,
    repair: Annotated[bool, typer.Option("--repair", help="Repack damaged shards with the original recipe.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Check the data set itself, before packing.")] = False,
) -> None:
    """Re-hash all shards, check them against the index, and report every problem."""
    from launch.commands.packed_shards import run_repair, run_verify, run_verify_source

    run = run_verify_source if source else run_repair if repair else run_verify
    run(shards_dir, overrides or [])


@_command("nd export shards mindeye2_files --subject 1 --subject 2")
def export(
    shards_dir: Annotated[str, typer.Argument(help="Folder of packed shards, or the URL of a copy.")],
    out_dir: Annotated[Path, typer.Argument(help="New folder for files in MindEye2's published layout.")],
    overrides: Overrides = None,
    subjects: Annotated[
        list[int] | None, typer.Option("--subject", help="Only this subject; can be repeated.")
    ] = None,
) -> None:
    """Convert packed shards to MindEye2's published files: betas, behaviour tars, pictures."""
    from launch.commands.packed_shards import run_export

    run_export(shards_dir, out_dir, subjects, overrides or [])


@_command(
    "nd train paper shards_dir=shards run_dir=runs/joint decoder.heads=joint --ranks 8",
    "nd train paper shards_dir=shards run_dir=runs --all-targets --subjects 1,2,5,7",
)
@launching
def train(
    words: LaunchWords,
    stages: Annotated[
        str, typer.Option("--stages", help="Stages to train, e.g. 1,2 (default: as in the recipe).")
    ] = "",
    subjects: Subjects = "",
    all_targets: AllTargets = False,
    grid: Annotated[
        bool, typer.Option("--grid", help=r"Train a grid: settings given as lists, key=\[a,b], are its axes.")
    ] = False,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Grid: number of trainings at a time on each host.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Write a torch profiler trace of some steps.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time a few steps; print hours, memory and disk.")
    ] = False,
) -> None:
    """Train voxel encoders, backbone and heads with DeepSpeed, in two stages; resumes automatically."""
    from launch.grid.plan import GridRequest, numbers, points_of
    from nd_dist.errors import ConfigError

    more = ["training.profile=true"] if profile else []
    wanted = numbers(stages, "--stages")
    if not (all_targets or subjects or grid):
        if at_once is not None:
            raise ConfigError("--at-once is an option of the grid.", todo="add --all-targets, --subjects or --grid")
        if estimate and not words.dry_run:
            from launch.commands.estimate import estimate_training
            from launch.recipe import load_recipe

            estimate_training(load_recipe(words.recipe, [*(words.overrides or []), *more], "train"), words.options)
            return
        words.launch("train", *more, *([f"training.stages={list(wanted)}"] if wanted else []))
        return
    from launch.commands.dry_run import dry_run_grid
    from launch.commands.estimate import estimate_grid
    from launch.grid.run import grid_command
    from launch.recipe import load_recipe, takes

    given = [*(words.overrides or []), *more]
    overrides, points = points_of(given, partial(takes, words.recipe)) if grid else (given, ((),))
    for point in points:
        load_recipe(words.recipe, [*overrides, *point], "train")  # says what is wrong with a point
    request = GridRequest(numbers(subjects, "--subjects"), wanted, all_targets, at_once=at_once, points=points)
    config = load_recipe(words.recipe, overrides, "train")
    run = dry_run_grid if words.dry_run else estimate_grid if estimate else grid_command
    run(config, request, words.options)


@_command("nd evaluate paper shards_dir=shards run_dir=runs/subj01 evaluation.controls=true --ranks 8")
@launching
def evaluate(words: LaunchWords) -> None:
    """Reconstruct the test images with and without guidance on MPI ranks, and score them."""
    words.launch("evaluate")


@_command("nd sweep paper shards_dir=shards run_dir=runs/subj01 sweep.kappa=[1e5,3e5] sweep.eta=[0.2] --estimate")
@launching
def sweep(
    words: LaunchWords,
    estimate: Annotated[bool, typer.Option("--estimate", help="Time a few units and print the costs.")] = False,
) -> None:
    """Pick a guidance setting on held-out training images, and score the whole grid on the test images."""
    words.launch("estimate" if estimate else "sweep")


@_command(
    "nd score originals reconstructions --protocol mindeye2 --judges judges --out runs/theirs",
    "nd score images.pt recons.pt --brain-features brain.pt --image-features clip.pt --out runs/me2",
)
def score(
    originals: Annotated[Path, typer.Argument(help="Pictures seen: a folder or an array (npy, npz, pt).")],
    reconstructions: Annotated[
        Path, typer.Argument(help="NAME.png, or several per image (NAME_0.png, NAME/0.png), or an array.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")],
    overrides: Overrides = None,
    protocol: Annotated[str, typer.Option("--protocol", help="Metric protocol (docs/evaluation.md).")] = "nd",
    judges: Annotated[
        Path | None, typer.Option("--judges", help="Folder of metric networks (default: pixel metrics only).")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="Name of the reconstructions in tables.")] = "",
    subject: Annotated[
        int, typer.Option("--subject", min=1, help="Subject number; `nd merge` averages subjects.")
    ] = 1,
    brain_features: Annotated[
        Path | None, typer.Option("--brain-features", help="Brain features for retrieval, one image per row.")
    ] = None,
    image_features: Annotated[
        Path | None, typer.Option("--image-features", help="Features of the originals for retrieval.")
    ] = None,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    launcher: LauncherName = "auto",
) -> None:
    """Score pictures made with other software by a named protocol: metrics, intervals, tables, report."""
    from launch.commands.score import score_command
    from launch.plans.choose import LaunchOptions

    settings = {
        "score.originals": originals,
        "score.reconstructions": reconstructions,
        "score.method": method or reconstructions.stem,
        "score.brain_features": brain_features,
        "score.image_features": image_features,
        "run_dir": out,
        "evaluation.protocol": protocol,
        "evaluation.judges_dir": judges,
        "evaluation.subjects": [subject],
    }
    score_command(settings, overrides or [], LaunchOptions(ranks, hostfile, launcher))


@_command(
    "nd reconstruct cat.jpg --caption 'a cat on a chair' --out pictures",
    "nd reconstruct --voxels betas.npy --model runs/subj01 --out pictures",
)
def reconstruct(
    out: Annotated[Path, typer.Option("--out", help="Folder to write NAME.png into.")],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Your own pictures, reconstructed from their true embeddings.")
    ] = None,
    voxels: Annotated[
        Path | None, typer.Option("--voxels", help="Z-scored betas instead, trials by voxels (.npy).")
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", help="Run folder, saved pipeline, Stable Diffusion folder, or name in the cache."),
    ] = "phantom/stable-diffusion",
    captions: Annotated[
        list[str] | None, typer.Option("--caption", help="What a picture shows; one per picture.")
    ] = None,
    subject: Annotated[int | None, typer.Option("--subject", min=1, help="Whose voxels.")] = None,
    kappa: Annotated[float | None, typer.Option("--kappa", min=0, help="Guidance scale; 0 is off.")] = None,
    eta: Annotated[float | None, typer.Option("--eta", min=0, max=1, help="Fraction of guided steps.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
) -> None:
    """Reconstruct your own pictures, or voxels, without a recipe; writes NAME.png for each."""
    from launch.commands.reconstruct import reconstruct_command

    settings = {"kappa": kappa, "eta": eta, **({"subject": subject} if subject is not None else {})}
    reconstruct_command(pictures or [], voxels, model, out, captions or [], settings, seed)


@_command(
    "nd submit train paper run_dir=/scratch/me/run slurm.ranks_per_node=8 slurm.gpus_per_node=8",
    "nd submit pack,train,evaluate paper run_dir=/scratch/me/run slurm.time=24:00:00 slurm.sbatch.mem=200G",
    "nd submit train,evaluate paper run_dir=/scratch/me/all --all-targets --subjects 1,2,5,7",
)
def submit(
    command: Submitted,
    recipe: Recipe,
    overrides: Overrides = None,
    array: Annotated[bool, typer.Option("--array", help="For a sweep: one array task per point.")] = False,
    all_targets: AllTargets = False,
    subjects: Subjects = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script without submitting it.")] = False,
) -> None:
    """Submit commands to Slurm with sbatch, with the resources given in the recipe's `slurm` section."""
    from launch.commands.submit import submit_command
    from launch.grid.plan import GridRequest, numbers

    chosen = numbers(subjects, "--subjects")
    grid = GridRequest(chosen, all_targets=all_targets) if all_targets or chosen else None
    submit_command(command, recipe, overrides or [], array, grid, dry_run)


@_command("nd status runs/subj01 --watch", "nd status runs")
def status(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, or of several.")],
    watch: Annotated[bool, typer.Option("--watch", help="Keep updating until the launch ends.")] = False,
) -> None:
    """Show the state of a run: stage, step, speed, hosts, last error, age of the last event."""
    from launch.commands.status import status_command

    status_command(run_dir, watch)


@_command("nd stop runs/subj01", "nd stop runs/subj01 --now")
def stop(
    run_dir: RunDir,
    now: Annotated[bool, typer.Option("--now", help="End it immediately, without saving.")] = False,
) -> None:
    """Ask a running launch, on any host, to save and stop; wait until it has, and report the result."""
    from launch.commands.status import stop_command

    stop_command(run_dir, now)


@_command("nd logs runs/subj01 -f", "nd logs runs/subj01 --rank 3 --command train")
def logs(
    run_dir: RunDir,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Rank whose log to print.")] = 0,
    command: Annotated[
        str, typer.Option("--command", help="Command whose log to print (default: the last one).")
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow this log and those of later commands, until the end.")
    ] = False,
) -> None:
    """Print the log of a rank."""
    from launch.commands.logs import logs_command

    logs_command(run_dir, rank, command, follow)


@_command("nd demo --ranks 4")
def demo(
    overrides: Overrides = None,
    ranks: Ranks = 2,
    recipe: RecipeOption = "demo",
    full: Annotated[bool, typer.Option("--full", help="A larger world, about half an hour: demo_full.")] = False,
) -> None:
    """Run the whole pipeline on a phantom: phantom, pack, verify, train, evaluate, sweep, report."""
    from launch.commands.demo import run_demo

    run_demo("demo_full" if full else recipe, overrides or [], ranks)


def main() -> None:
    """Run `nd`."""
    guarded(app)


if __name__ == "__main__":
    main()
