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


def test_deepspeeds_ranks_below_one_slurm_task_per_node_belong_to_deepspeed() -> None:
    nodes = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    assert World.from_env({**nodes, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1, "torch")
    with pytest.raises(WorldError):
        World.from_env({**nodes, "SLURM_STEP_NUM_TASKS": "4", "RANK": "3", "WORLD_SIZE": "6"})


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


def test_a_world_of_one_gathers_and_broadcasts_its_own_value() -> None:
    comm = connect(World())
    assert (comm.rank, comm.size, comm.gather(5), comm.broadcast("x")) == (0, 1, [5], "x")
