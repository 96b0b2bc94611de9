import pytest

from launch.plans.choose import LaunchOptions, make_plan
from launch.plans.plan import LaunchPlan
from launch.plans.tools import Tools
from launch.recipe import load_recipe


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[08-10],login")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4(x4)")


def plan_of(command: str, *words: str) -> LaunchPlan:
    return make_plan(command, load_recipe("demo", words), LaunchOptions(launcher="srun"), Tools("python"), "L")


def test_the_hosts_of_an_allocation_come_from_slurm(allocation: None) -> None:
    plan = plan_of("train")
    assert [(host.name, host.slots) for host in plan.hosts] == [
        ("gpu08", 4), ("gpu09", 4), ("gpu10", 4), ("login", 4),
    ]  # fmt: skip
    assert "--kill-on-bad-exit=0" in plan_of("evaluate").argv, "leased work goes on without a rank"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_srun_is_given_the_recipes_own_words(command: str, allocation: None) -> None:
    words = ["slurm.srun_options=[--container-image=/images/nd.sqsh,--container-mounts=/scratch]"]
    argv = plan_of(command, *words).argv
    program = argv.index("python")
    assert argv[program - 2 : program] == ("--container-image=/images/nd.sqsh", "--container-mounts=/scratch")


@pytest.mark.parametrize("words", [(), ("slurm.mpi=none",)])
def test_ranks_meet_at_the_first_host_and_need_no_mpi(words: tuple[str, ...], allocation: None) -> None:
    plan = plan_of("evaluate", *words)
    assert "--mpi=none" in plan.argv
    assert plan.env["MASTER_ADDR"] == "gpu08"


def test_ranks_meet_by_the_plugin_that_the_recipe_names_but_in_training(allocation: None) -> None:
    plan = plan_of("evaluate", "slurm.mpi=pmi2")
    assert "--mpi=pmi2" in plan.argv
    assert "MASTER_ADDR" not in plan.env
    assert plan.env["MPIR_CVAR_CH4_NETMOD"] == "ofi", "UCX publishes addresses that PMI2 does not take"
    train = plan_of("train", "slurm.mpi=pmix")
    assert ("--mpi=pmix" in train.argv, train.env["MASTER_ADDR"]) == (True, "gpu08")
