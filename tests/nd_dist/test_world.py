import os
import socket
import subprocess
import sys

import pytest

from nd_dist.comm import connect
from nd_dist.errors import WorldError
from nd_dist.world import World


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1, "torch")),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, World(1, 2, 0, "openmpi")),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, World(0, 4, 0, "pmi")),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}, World(5, 6, 2, "slurm")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, World()),
    ],
)
def test_each_launcher_family_is_understood(environ: dict[str, str], expected: World) -> None:
    assert World.from_env(environ) == expected


def test_one_slurm_task_that_runs_mpirun_belongs_to_mpirun() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "2", "PMI_SIZE": "4"}
    assert World.from_env(environ) == World(2, 4, 0, "pmi")


NODE_OF_SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
NODE_OF_MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "environ",
    [
        {**NODE_OF_SRUN, **RANK, "CROSS_RANK": "1", "CROSS_SIZE": "2"},  # deepspeed's launcher once per node
        {**NODE_OF_SRUN, **RANK, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"},  # torchrun once per node
        {**NODE_OF_MPIRUN, **RANK, "TORCHELASTIC_RUN_ID": "x"},
        {**NODE_OF_SRUN, **NODE_OF_MPIRUN, **RANK, "TORCHELASTIC_RUN_ID": "x"},
        {**NODE_OF_SRUN, **RANK},  # variables that a script sets below srun
    ],
)
def test_the_innermost_of_nested_launchers_counts(environ: dict[str, str]) -> None:
    assert World.from_env(environ) == World(3, 4, 1, "torch")


def test_mpirun_whose_helpers_srun_started_counts_and_sruns_own_pmi_plugin_does_not() -> None:
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
    assert World.from_env({**NODE_OF_SRUN, **hydra}) == World(3, 4, 1, "pmi")
    one_per_node = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    assert World.from_env({**NODE_OF_SRUN, **one_per_node}) == World(1, 2, 0, "pmi")
    plugin = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "11"}
    assert World.from_env({**NODE_OF_SRUN, **plugin}) == World(1, 2, 0, "slurm")
    openmpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert World.from_env({**NODE_OF_SRUN, **openmpi}) == World(3, 4, 1, "openmpi")


def test_families_that_agree_are_accepted() -> None:
    environ = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "PMI_RANK": "2", "PMI_SIZE": "4"}
    assert (World.from_env(environ).rank, World.from_env(environ).size) == (2, 4)


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "3"},
    ],
)
def test_incomplete_wrong_or_contradicting_variables_are_an_error_and_never_a_world_of_one(
    environ: dict[str, str],
) -> None:
    with pytest.raises(WorldError):
        World.from_env(environ)


def test_ranks_that_mpi_does_not_see_are_refused() -> None:
    with pytest.raises(WorldError, match="does not see|finds no MPI"):
        connect(World(0, 3, 0, "slurm"))


MEET = """
import os, sys
from nd_dist.comm import connect
from nd_dist.world import World
comm = connect(World.from_env(os.environ))
gathered = comm.gather({"rank": comm.rank})
said = comm.broadcast(gathered if comm.rank == 0 else None)
comm.barrier()
comm.finish()
assert "mpi4py.MPI" not in sys.modules
print(comm.size, [each["rank"] for each in said], len(gathered))
"""


@pytest.mark.launch
def test_ranks_that_are_told_where_to_meet_need_no_mpi() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_STEP_NUM_TASKS": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET], env={**os.environ, **meeting, "SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=300)[0].strip() for rank in ranks]
    assert answers == ["3 [0, 1, 2] 3", "3 [0, 1, 2] 0", "3 [0, 1, 2] 0"]


def test_a_world_of_one_gathers_and_broadcasts_its_own_value() -> None:
    comm = connect(World())
    assert (comm.rank, comm.size, comm.gather(5), comm.broadcast("x")) == (0, 1, [5], "x")
