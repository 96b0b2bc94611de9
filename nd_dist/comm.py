"""Collective calls over MPI: the only file that imports mpi4py. One process without MPI is a world of one.

Used for the world check, the gather of small results and barriers of pack and evaluate; DeepSpeed's ranks talk
through torch.distributed instead.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from nd_dist.errors import WorldError
from nd_dist.world import World


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
    mpi = load_required_mpi()
    comm = Comm(mpi.COMM_WORLD)
    if comm.size != world.size:
        raise WorldError(
            "MPI does not see the ranks that the launcher started (each would work alone).",
            expected=f"{world.size} ranks ({world.family})",
            found=f"{comm.size} in MPI.COMM_WORLD ({mpi.Get_library_version().splitlines()[0]})",
            todo="use the mpirun that belongs to mpi4py's MPI library; `nd doctor` names both",
        )
    return comm
