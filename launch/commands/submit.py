"""`nd submit`: writes the sbatch script of a command beside the run's config and hands it to Slurm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.console import make_console
from launch.keys import nearest
from launch.plans.slurm import Submission, sbatch_text
from launch.recipe import load_recipe, write_config
from launch.supervise.preflight import advice, preflight
from nd_dist.config import Config
from nd_dist.errors import ConfigError, RankFailure
from nd_dist.files import write_text
from nd_dist.versions import CODE_DIR

SUBMITTED = ("pack", "train", "evaluate", "sweep")
SBATCH_WITHIN_S = 60


def submit_command(command: str, recipe: str, overrides: Sequence[str], is_array: bool, dry_run: bool) -> None:
    """Write config and script of a command and submit it, or print the script.

    Raises:
        ConfigError: a command that cannot be submitted, an array of something else than a sweep, no sbatch.
        RankFailure: sbatch refused the script.
    """
    if command not in SUBMITTED:
        todo = nearest(command, SUBMITTED)
        raise ConfigError(
            "Such a command cannot be submitted.", found=command, expected=", ".join(SUBMITTED), todo=todo
        )
    if is_array and command != "sweep":
        raise ConfigError("Only a sweep is an array.", where=f"nd submit {command}", todo="leave --array out")
    config = load_recipe(recipe, overrides, command)
    script = sbatch_text(submission_of(command, config, is_array), config.slurm)
    console = make_console()
    if dry_run:
        console.print(script, end="")
    packed = not isinstance(config.shards_dir, Path) or (config.shards_dir / "index.json").is_file()
    if command == "train" and (packed or dry_run):  # else the job waits in the queue for that which packs
        preflight(command, config)
        for line in advice(command, config, config.slurm.nodes * config.slurm.ranks_per_node, dry_run):
            console.print(f"# {line}" if dry_run else f"  note: {line}")
    if dry_run:
        return
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("There is no sbatch on this machine.", todo="run the command on a login node of the cluster")
    write_config(config)
    path = config.run_dir / "slurm" / f"{command}.sbatch"
    write_text(path, script)
    answer = subprocess.run(
        [sbatch, "--parsable", str(path)], capture_output=True, text=True, timeout=SBATCH_WITHIN_S, check=False
    )
    if answer.returncode != 0:
        raise RankFailure("sbatch refused the job.", where=str(path), found=answer.stderr.strip())
    console.print(f"  submitted job {answer.stdout.strip()} -> {path}")


def submission_of(command: str, config: Config, is_array: bool) -> Submission:
    """Return what is submitted for a command of a recipe."""
    run_dir = config.run_dir.resolve()
    sweep = config.sweep
    points = [(kappa, eta) for kappa in sweep.kappa for eta in sweep.eta] if is_array else []
    return Submission(
        command,
        run_dir / "config.yaml",
        sys.executable,
        CODE_DIR,
        run_dir / "slurm" / (f"{command}-%A-%a.out" if is_array else f"{command}-%j.out"),
        tuple(points),
    )
