"""`nd submit`: writes the sbatch scripts of commands beside the run's config and hands them to Slurm."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from launch.console import make_console
from launch.grid.plan import GridRequest, plan_grid, subject_dir
from launch.keys import nearest
from launch.plans.sbatch import SUBMITTED, Submission, sbatch_text, unasked_memory
from launch.recipe import config_yaml, load_recipe
from launch.supervise.checks import Checks, checks_of
from launch.supervise.preflight import advice, require
from nd_dist.config import Config
from nd_dist.errors import ConfigError, RankFailure
from nd_dist.files import write_text
from nd_dist.versions import CODE_DIR

SBATCH_WITHIN_S = 60


def submit_command(
    words: str, recipe: str, overrides: Sequence[str], is_array: bool, grid: GridRequest | None, dry_run: bool
) -> None:
    """Submit commands joined by commas, each after the one before it, or print their scripts (see `nd submit --help`).

    Raises:
        ConfigError: a command or an option that comes to nothing, or no sbatch.
        RankFailure: sbatch refused a script.
    """
    commands = words.split(",")
    config = [load_recipe(recipe, overrides, command) for command in commands][-1]
    jobs, note, console = plan_jobs(commands, config, is_array, grid), unasked_memory(config.slurm), make_console()
    if dry_run:
        for job in jobs:
            waits = f"# sbatch --dependency={job.after}:JOB, the job above\n" if job.after else ""
            console.print(waits + sbatch_text(job), end="")
        console.print(f"# note: {note}\n" if note else "", end="")
    ranks = config.slurm.nodes * config.slurm.ranks_per_node
    found = require(_checks(commands, config, grid, ranks))
    for name, text in found.items() if dry_run and not grid else ():
        console.print(f"# {name}: {text}")
    for line in advice("train", config, ranks) if "train" in commands and not grid else ():
        console.print(f"# note: {line}" if dry_run else f"  note: {line}")
    if dry_run:
        return
    require_sbatch()
    numbers: list[str] = []
    for job in jobs:
        write_text(job.config_path, config_yaml(config))
        if is_array and job.command == "sweep":
            _link_checkpoints(config)
        numbers.append(submit(job, f"{job.after}:{numbers[-1]}" if job.after else "", numbers))
        waits = f", {job.after} the one before" if job.after else ""
        console.print(f"  submitted job {numbers[-1]} ({job.name}{waits}) -> {job.script_path}")
    if note:
        console.print(f"  note: {note}")


def require_sbatch() -> None:
    """Refuse to submit where that is not possible.

    Raises:
        ConfigError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("There is no sbatch on this machine.", todo="run the command on a login node of the cluster")


def _checks(commands: Sequence[str], config: Config, grid: GridRequest | None, ranks: int) -> Checks:
    """Return the checks of all commands, each after those before it."""
    from launch.grid.state import grid_checks  # imports numpy, for which a shell that completes words does not wait

    checks: Checks = {}
    for number, command in enumerate(commands):
        before = commands[:number]
        if grid and command == "train":
            checks |= grid_checks(config, plan_grid(config, grid), ranks, before)
            continue
        for subject in (grid.subjects if grid and command != "pack" else ()) or (config.training.target_subject,):
            own: dict[str, int | str] = {"training.target_subject": subject}
            own |= {"run_dir": str(subject_dir(config, subject))} if grid else {}
            found = checks_of(command, config.replaced(own), ranks, before)
            checks |= {
                f"{command}, {name}" + (f", subject {subject}" if grid else ""): each for name, each in found.items()
            }
    return checks


def plan_jobs(commands: Sequence[str], config: Config, is_array: bool, grid: GridRequest | None) -> list[Submission]:
    """Return what is submitted for commands of a recipe, each of which waits for the one before it.

    Raises:
        ConfigError: a command that cannot be submitted, or options that no command has a use for.
    """
    if unknown := [command for command in commands if command not in SUBMITTED]:
        raise ConfigError(
            "Such a command cannot be submitted.",
            found=", ".join(unknown),
            expected=f"{', '.join(SUBMITTED)}; several are joined by commas",
            todo=nearest(unknown[0], SUBMITTED),
        )
    if is_array and ("sweep" not in commands or grid):
        raise ConfigError("Only a sweep is an array, that of one decoder.", todo="leave --array out")
    if grid and set(commands) == {"pack"}:
        raise ConfigError("The grid is one of trainings.", todo="leave --all-targets and --subjects out")
    config = config.model_copy(update={"run_dir": config.run_dir.resolve()})
    jobs = [job for command in commands for job in _jobs_of(command, config, is_array, grid)]
    return [replace(job, after=job.after or "afterok") if number else job for number, job in enumerate(jobs)]


def _jobs_of(command: str, config: Config, is_array: bool, grid: GridRequest | None) -> list[Submission]:
    """Return the jobs of one command."""
    job = Submission(command, command, config.run_dir / "config.yaml", sys.executable, CODE_DIR, config.slurm)
    if grid and command == "train":
        return _trainings(job, config, grid)
    if grid and command in ("evaluate", "sweep"):
        subjects = grid.subjects or (config.training.target_subject,)
        words = ((f"run_dir={subject_dir(config, s)}", f"training.target_subject={s}") for s in subjects)
        return [replace(job, tasks=tuple(words))]
    if is_array and command == "sweep":
        return [replace(job, tasks=tuple((f"run_dir={part}", *words) for part, words in _points(config)))]
    return [job]


def _trainings(job: Submission, config: Config, grid: GridRequest) -> list[Submission]:
    """Return an array of trainings for each stage, and the job that makes each subject's decoder of its networks."""
    plan = plan_grid(config, grid)
    stages = sorted({training.stage for training in plan})
    job = replace(job, config_path=config.run_dir / "grid.yaml")
    arrays = [
        replace(
            job,
            name=f"train-stage{stage}",
            tasks=tuple(training.overrides for training in plan if training.stage == stage),
            after="aftercorr" if stage != stages[0] else "",
        )
        for stage in stages
    ]
    if config.decoder.heads == "joint":
        return arrays
    subjects = ",".join(map(str, grid.subjects or (config.training.target_subject,)))
    chosen = (*(("--all-targets",) if grid.all_targets else ()), "--subjects", subjects)
    small = config.slurm.model_copy(update={"nodes": 1, "ranks_per_node": 1})  # it finds all trainings done
    return [*arrays, replace(job, name="train-merge", words=(*chosen, "--launcher", "local"), slurm=small)]


def _points(config: Config) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield the run folder and the words of each point of a sweep."""
    for point in itertools.product(config.sweep.kappa, config.sweep.eta):
        kappa, eta = (repr(value).removesuffix(".0") for value in point)
        part = config.run_dir / "sweep" / f"kappa-{kappa}-eta-{eta}"
        yield part, (f"sweep.kappa=[{kappa}]", f"sweep.eta=[{eta}]")


def _link_checkpoints(config: Config) -> None:
    """Give the run folders of a sweep's points the trained decoder."""
    for part, _ in _points(config):
        part.mkdir(parents=True, exist_ok=True)
        if not (part / "checkpoints").is_symlink():
            (part / "checkpoints").symlink_to("../../checkpoints")


def submit(job: Submission, dependency: str, before: Sequence[str]) -> str:
    """Submit one job; return its number.

    Args:
        job: The job.
        dependency: What it waits for, as sbatch is told; empty: nothing.
        before: Numbers of the jobs that were submitted with it.

    Raises:
        RankFailure: sbatch refused it.
    """
    write_text(job.script_path, sbatch_text(job))
    words = ["sbatch", "--parsable"]
    if dependency:
        words += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    answer = subprocess.run(
        [*words, str(job.script_path)], capture_output=True, text=True, timeout=SBATCH_WITHIN_S, check=False
    )
    if answer.returncode != 0:
        raise RankFailure(
            "sbatch refused the job.",
            where=str(job.script_path),
            found=answer.stderr.strip(),
            todo=f"the jobs before it were submitted: scancel {' '.join(before)}" if before else "",
        )
    return answer.stdout.strip().partition(";")[0]
