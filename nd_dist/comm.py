"""The few collective calls of pack and evaluate: agree on the job, gather small results, wait for each other.

Where a meeting place is named (MASTER_ADDR) they meet there, as in training; else they talk MPI, and this is the only
file that imports mpi4py. One process alone is a world of one.
"""

from __future__ import annotations

from datetime import timedelta
from types import ModuleType
from typing import Any

from nd_dist.errors import WorldError
from nd_dist.world import World

WAIT = timedelta(days=30)
"""Of one rank for another: a share of the packing may last for days; who watches the launch ends what hangs."""


class Comm:
    """A communicator of ``size`` ranks; every rank calls each method, in the same order.

    Args:
        mpi: mpi4py's communicator, or None in a world of one.
    """

    def __init__(self, mpi: Any = None) -> None:  # Any: mpi4py is optional at run time
        self._mpi = mpi
        self.rank: int = mpi.Get_rank() if mpi is not None else 0
        self.size: int = mpi.Get_size() if mpi is not None else 1

    def gather(self, value: object) -> list[Any]:
        """Return every rank's value in rank order on rank 0, an empty list elsewhere."""
        return (self._mpi.gather(value) or []) if self._mpi is not None else [value]

    def broadcast(self, value: object) -> Any:
        """Return rank 0's value on every rank."""
        return self._mpi.bcast(value) if self._mpi is not None else value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self._mpi is not None:
            self._mpi.Barrier()

    def finish(self) -> None:
        """Wait for every rank, then leave MPI: a rank that exits later is then no failure to the launcher."""
        if self._mpi is not None:
            self._mpi.Barrier()
            load_required_mpi().Finalize()


class _Meeting(Comm):
    """The ranks of a world in torch.distributed, on the CPU."""

    def __init__(self, world: World) -> None:
        from torch import distributed

        super().__init__()
        self.rank, self.size, self._calls = world.rank, world.size, distributed
        distributed.init_process_group("gloo", rank=world.rank, world_size=world.size, timeout=WAIT)

    def gather(self, value: object) -> list[Any]:
        found = [None] * self.size if self.rank == 0 else None
        self._calls.gather_object(value, found)
        return found or []

    def broadcast(self, value: object) -> Any:
        box = [value]
        self._calls.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        self._calls.barrier()

    def finish(self) -> None:
        self.barrier()


def load_mpi() -> ModuleType | None:
    """Return mpi4py.MPI, None where mpi4py finds no MPI library (it raises RuntimeError then)."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI


def load_required_mpi() -> ModuleType:
    """Return mpi4py.MPI.

    Raises:
        WorldError: mpi4py finds no MPI library.
    """
    mpi = load_mpi()
    if mpi is None:
        raise WorldError(
            "Several ranks were started, but mpi4py finds no MPI library.",
            todo="install one: pip install mpich",
        )
    return mpi


def connect(world: World) -> Comm:
    """Return the communicator of the world that the launcher described.

    Raises:
        WorldError: the launcher announced more ranks than MPI sees (silent singletons), or MPI is missing.
    """
    if world.size == 1:
        return Comm()
    if world.meeting:
        return _Meeting(world)
    mpi = load_required_mpi()
    comm = Comm(mpi.COMM_WORLD)
    if comm.size != world.size:
        raise WorldError(
            "MPI does not see the ranks that the launcher started (each would work alone).",
            expected=f"{world.size} ranks ({world.family})",
            found=f"{comm.size} in MPI.COMM_WORLD ({mpi.Get_library_version().splitlines()[0]})",
            todo="use the mpirun that belongs to mpi4py's MPI library (`nd doctor` names both), or any mpirun with "
            "`python -m launch.join`, which needs no MPI library",
        )
    return comm
