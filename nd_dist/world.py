"""The world a process belongs to: rank, size, and who started it. The only reader of launcher variables.

Families are all-or-nothing: a launcher that set only some of its variables, or two launchers that contradict each
other, is an error and never a silent world of one. Launchers may be nested (srun starts mpirun's helpers or a torchrun
on every node): the innermost counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nd_dist.errors import WorldError

Family = Literal["single", "torch", "openmpi", "pmi", "slurm"]

# family -> (rank, size, local rank or None): variables that the launchers set (read in their sources or observed)
_FAMILIES: dict[Family, tuple[str, str, str | None]] = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed's launch.py and torchrun
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH and Intel MPI (hydra)
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class World:
    """Who this process is among its ranks.

    Args:
        rank: 0-based global rank.
        size: Number of ranks.
        local_rank: 0-based rank on this host (chooses the GPU).
        family: Which launcher's variables said so; ``single`` where none did.
        meeting: Host at which the ranks can meet (MASTER_ADDR); empty where nobody named one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    family: Family = "single"
    meeting: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @staticmethod
    def from_env(environ: Mapping[str, str]) -> World:
        """Return the world that the launcher described in ``environ``.

        Raises:
            WorldError: a family is incomplete, not a number, out of range, or two families disagree on rank or size.
        """
        found = [world for family in _FAMILIES if (world := _read_family(family, environ)) is not None]
        found = [world for world in found if not _is_outer(world, found, environ)]
        if not found:
            return World()
        sizes = {(world.rank, world.size) for world in found if world.size > 1} or {(0, 1)}
        if len(sizes) > 1:
            raise WorldError(
                "Two launchers describe different worlds.",
                where=", ".join(f"{w.family}: rank {w.rank} of {w.size}" for w in found),
                todo="use only one launcher, or unset the other's variables",
            )
        return replace(max(found, key=lambda world: world.size), meeting=environ.get("MASTER_ADDR", ""))


def _is_outer(world: World, found: Sequence[World], environ: Mapping[str, str]) -> bool:
    """Return whether another launcher, which described a world of its own, runs inside this one."""
    numbers = {each.family: (each.rank, each.size) for each in found}
    if world.family == "torch":
        return False
    if "torch" in numbers and {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & set(environ):  # torchrun and DeepSpeed on a node
        return True
    # srun's PMI plugin is no launcher: it repeats srun's numbers; hydra below srun counts ranks on a host as well
    is_plugin = numbers.get("pmi") == numbers.get("slurm") and "MPI_LOCALRANKID" not in environ
    if world.family == "slurm":
        return len(found) > 1 and not (is_plugin and len(found) == 2)
    return world.family == "pmi" and is_plugin


def _read_family(family: Family, environ: Mapping[str, str]) -> World | None:
    """Return the world of one launcher family, None where it set neither rank nor size."""
    rank_name, size_name, local_name = _FAMILIES[family]
    present = [name for name in (rank_name, size_name) if name in environ]
    if not present:
        return None
    if family == "slurm" and size_name not in environ:
        return None  # an sbatch script itself (no step): SLURM_PROCID alone is no world
    if len(present) == 1:
        raise WorldError(
            f"The {family} launcher set only a part of its variables.",
            expected=f"{rank_name} and {size_name}",
            found=present[0],
            todo="unset it, or start the program through the launcher",
        )
    try:
        rank, size = int(environ[rank_name]), int(environ[size_name])
        local_rank = int(environ.get(local_name, "0")) if local_name else 0
    except ValueError as error:
        raise WorldError(f"The {family} launcher's variables are not numbers.", found=str(error)) from error
    if not 0 <= rank < size:
        raise WorldError(
            f"The {family} launcher's rank is outside its world.",
            expected=f"0 <= {rank_name} < {size_name}",
            found=f"{rank_name}={rank}, {size_name}={size}",
        )
    return World(rank, size, local_rank, family)
