"""What a command needs, checked in seconds before ranks are started for hours."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.supervise.checks import Checks, checks_of, read_index, run_checks
from nd_dist.config import Config
from nd_dist.errors import ConfigError, NdDistError

FEW_ROWS = 4
"""Rows of a rank below which its messages outweigh its work (docs/training.md, "Many GPUs")."""

if TYPE_CHECKING:
    from launch.plans.plan import LaunchPlan


class Problems(NdDistError):
    """Several things that a command would fail on, in one message.

    Args:
        problems: The errors.
    """

    def __init__(self, problems: Sequence[NdDistError]) -> None:
        self.problems, self.exit_code = tuple(problems), problems[0].exit_code
        super().__init__(f"{len(problems)} things are wrong; nothing was started.")

    def render(self) -> str:
        """Return the message: every error with its parts."""
        numbered = (f"{number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return "\n".join([self.what, *numbered])


def preflight(command: str, config: Config, ranks: int = 1) -> dict[str, str]:
    """Return what the checks of a command found, by name; raise every error at once that it would meet later.

    Raises:
        NdDistError: see ``require``.
    """
    return require(checks_of(command, config, ranks))


def require(checks: Checks) -> dict[str, str]:
    """Return what checks found.

    Raises:
        NdDistError: something is wrong; ``Problems`` where several things are.
    """
    found, problems = run_checks(checks)
    if len(problems) > 1:
        raise Problems(list(problems.values()))
    for problem in problems.values():
        raise problem
    return found


def advice(command: str, config: Config, ranks: int) -> list[str]:
    """Return what is worth knowing of a command that passed ``preflight``: ranks without use, a better way.

    Args:
        command: Only `train` has some.
        config: Its recipe.
        ranks: Ranks that would be started.
    """
    if command != "train":
        return []
    training, notes = config.training, list[str]()
    if config.decoder.kind == "ridge" or config.fits_ridge_beside:
        from launch.supervise.memory import ridge_cost

        notes.append(ridge_cost(config, read_index(config)))
    if config.decoder.kind == "ridge":
        return notes
    from nd_dist.training.source import stage_request

    if config.decoder.heads == "single" and len(training.targets) > 1:
        notes.append(f"{len(training.targets)} networks are trained as one; --all-targets trains each separately")
    rows = min(stage_request(config, stage, ranks).num_rows for stage in training.stages)
    if rows < FEW_ROWS * ranks:
        notes.append(
            f"{ranks} ranks share the {rows} rows of a step: more time is spent on communication than on work. "
            "--all-targets and --subjects run many trainings on a few ranks each; training.rows_per_rank enlarges the "
            "batch"
        )
    return notes


def require_starters(plan: LaunchPlan) -> None:
    """Refuse a plan whose starting program is missing.

    Raises:
        ConfigError: pdsh or srun is not on PATH.
    """
    for program, package in (("pdsh", "pdsh"), ("srun", "slurm-client")):
        if program in plan.argv and shutil.which(program) is None:
            raise ConfigError(f"There is no {program} on this machine.", todo=f"apt-get install {package}")


def require_gpus(where: str, ranks: int, gpus: int) -> None:
    """Refuse more training ranks on a host than it has GPUs: NCCL does not let two share one.

    Args:
        where: The host.
        ranks: Ranks that will run there.
        gpus: GPUs that it shows; 0 trains on the CPU, with any number of ranks.

    Raises:
        ConfigError: there are too many.
    """
    if 0 < gpus < ranks:
        raise ConfigError(
            "There are more training ranks than GPUs on a host.",
            where=where,
            expected=f"at most {gpus} ranks",
            found=ranks,
            todo=f"use --ranks {gpus} (slots={gpus} in a hostfile); two trainings on one GPU are two runs",
        )
