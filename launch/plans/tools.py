"""What the launching machine has for starting ranks: found once at the edge, handed to the pure planners."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nd_dist.errors import WorldError

if TYPE_CHECKING:
    from nd_dist.config import LaunchConfig

MpiFlavour = Literal["mpich", "openmpi"]
PORTS_TRIED = 50
ANSWER_WITHIN_S = 60


@dataclass(frozen=True)
class Tools:
    """What the launching machine has: found once at the edge, passed to the pure planners.

    Args:
        python: The interpreter that the ranks run.
        mpirun: Path of mpirun, empty if there is no MPI.
        mpi_flavour: Which mpirun it is.
        port: A free port for the rendezvous, on the first host.
        address: Address of the first host for the rendezvous; empty: its name.
        openmpi: Path of an Open MPI mpirun, for DeepSpeed's launcher of that name; empty if there is none.
        path: The PATH to search programs in.
        slurm_mpi: Which of Slurm's MPI plugins starts ranks of mpi4py's library; empty if none does.
    """

    python: str
    mpirun: str = ""
    mpi_flavour: MpiFlavour = "mpich"
    port: int = 29500
    address: str = ""
    openmpi: str = ""
    path: str = ""
    slurm_mpi: str = "pmi2"


def find_tools(launch: LaunchConfig | None = None) -> Tools:
    """Return what this machine has for starting ranks; the environment's own mpirun comes first.

    Raises:
        WorldError: no port is free where the recipe wants one.
    """
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun") or ""
    flavour = _mpi_flavour(mpirun)
    openmpi = mpirun if flavour == "openmpi" else _find_openmpi()
    mpirun = mpirun if flavour else ""
    python, first = (launch.python or sys.executable, launch.port) if launch else (sys.executable, 0)
    port = require_port(free_port_from(first), first)
    plugin = slurm_mpi(python) if "SLURM_JOB_ID" in os.environ and shutil.which("srun") else "pmi2"
    return Tools(python, mpirun, flavour or "mpich", port, "", openmpi, os.environ.get("PATH", ""), plugin)


def _mpi_flavour(mpirun: str) -> MpiFlavour | None:
    """Return which MPI an mpirun belongs to; none where there is none that can be run."""
    answer = _answer(mpirun, "--version")  # none of a link to nowhere, or of a file of another processor
    return ("openmpi" if "Open MPI" in answer else "mpich") if answer else None


def _find_openmpi() -> str:
    """Return the path of an Open MPI mpirun that is not the first on PATH, empty if there is none."""
    known = shutil.which("ompi_info")
    beside = str(Path(known).with_name("mpirun")) if known else ""
    return beside if beside and _mpi_flavour(beside) == "openmpi" else ""


def slurm_mpi(python: str) -> str:
    """Return the plugin of Slurm that starts ranks of the MPI library that an interpreter's mpi4py loads."""
    library = _answer(python, "-m", "mpi4py", "--mpi-lib-version")
    plugins = set(re.findall(r"[\w-]+", _answer("srun", "--mpi=list")))
    wanted = ("pmix",) if "Open MPI" in library else ("cray_shasta", "pmi2") if "CRAY" in library else ("pmi2",)
    return next((name for name in wanted if name in plugins), "")


def _answer(*words: str) -> str:
    """Return what a command prints, an empty text if it does not answer."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_WITHIN_S)
        return answer.stdout + answer.stderr
    return ""


def free_port_from(first: int) -> int:
    """Return the first free TCP port from ``first`` on, any free one for 0; 0 where none of them is free."""
    for port in range(first, first + PORTS_TRIED) if first else (0,):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return int(listener.getsockname()[1])
    return 0


def require_port(port: int, first: int, host: str = "this machine") -> int:
    """Return the port that was found.

    Raises:
        WorldError: none was free.
    """
    if port == 0:
        raise WorldError(
            "No port for the rendezvous is free.",
            where=host,
            expected=f"a free one of {first} to {first + PORTS_TRIED - 1}",
            todo="set launch.port to another first port, or to 0 for any",
        )
    return port
