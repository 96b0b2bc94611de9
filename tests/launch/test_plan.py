import shlex
from pathlib import Path

import pytest

from launch.commands import NO_MPI_NOTE, LaunchOptions, make_plan, rank_environment
from launch.hosts import Host
from launch.plan import RankProgram, Tools, deepspeed_plan, mpirun_plan, single_plan
from launch.recipe import load_recipe
from nd_dist.errors import ConfigError

HOSTILE = Path("/data/a run with $HOME, 'quotes' and %h/config.yaml")
PROGRAM = RankProgram("launch.train_rank", HOSTILE, "L1")
TOOLS = Tools("/env/bin/python", "/env/bin/mpirun", "mpich", 29501)
TWO_HOSTS = (Host("node1", 2), Host("node2", 1))


def test_a_local_deepspeed_plan_is_the_documented_command() -> None:
    plan = deepspeed_plan(PROGRAM, TOOLS, {}, (Host("localhost", 2),), None)
    assert plan.ranks == 2
    assert list(plan.argv) == [
        "/env/bin/python", "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29501",
        "--no_local_rank", "--module", "launch.train_rank", str(HOSTILE), "L1",
    ]  # fmt: skip


def test_a_deepspeed_plan_over_hosts_names_each_slot() -> None:
    plan = deepspeed_plan(PROGRAM, TOOLS, {}, TWO_HOSTS, Path("hosts"))
    assert plan.ranks == 3
    assert plan.argv[plan.argv.index("--include") + 1] == "node1:0,1@node2:0"
    assert plan.argv[plan.argv.index("--launcher") + 1] == "pdsh"


def test_mpich_and_openmpi_get_their_own_flags() -> None:
    mpich = mpirun_plan(PROGRAM, TOOLS, {"A": "1"}, TWO_HOSTS, Path("hosts"))
    assert mpich.argv[:8] == ("/env/bin/mpirun", "-n", "3", "-hosts", "node1:2,node2:1", "-genv", "A", "1")
    openmpi = mpirun_plan(PROGRAM, Tools("p", "mpirun", "openmpi"), {"A": "1"}, TWO_HOSTS, Path("hosts"))
    assert "--oversubscribe" in openmpi.argv
    assert openmpi.argv[openmpi.argv.index("-x") + 1] == "A"


def test_the_printed_line_splits_back_into_the_same_words_whatever_the_path_holds() -> None:
    plan = single_plan(PROGRAM, TOOLS, {"NOTE": "two words"})
    words = shlex.split(plan.shell())
    assert words == ["NOTE=two words", *plan.argv]


@pytest.mark.parametrize("command", ["pack", "evaluate", "sweep"])
def test_without_mpi_one_process_does_the_work_and_says_so(command: str) -> None:
    plan = make_plan(command, load_recipe("demo"), LaunchOptions(ranks=2), Tools("python"), "L")
    assert plan.ranks == 1
    assert plan.note == NO_MPI_NOTE


def test_one_rank_needs_no_launcher() -> None:
    for command in ("pack", "train", "evaluate"):
        plan = make_plan(command, load_recipe("demo"), LaunchOptions(ranks=1), TOOLS, "L")
        assert plan.argv[:3] == ("/env/bin/python", "-m", f"launch.{command}_rank")


def test_ranks_come_from_the_option_then_from_the_recipe(tmp_path: Path) -> None:
    config = load_recipe("demo", ["launch.ranks=3"])
    assert make_plan("pack", config, LaunchOptions(), TOOLS, "L").ranks == 3
    assert make_plan("pack", config, LaunchOptions(ranks=2), TOOLS, "L").ranks == 2
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=4\nb slots=4\n")
    assert make_plan("pack", load_recipe("demo"), LaunchOptions(hostfile=hostfile), TOOLS, "L").ranks == 8
    assert make_plan("pack", config, LaunchOptions(ranks=5, hostfile=hostfile), TOOLS, "L").ranks == 5


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", LaunchOptions(launcher="mpirun")),
        ("pack", LaunchOptions(launcher="deepspeed-pdsh")),
        ("pack", LaunchOptions(launcher="bsub")),
        ("pack", LaunchOptions(launcher="local", hostfile=Path("hosts"))),
    ],
)
def test_a_launcher_that_cannot_start_a_command_is_refused(command: str, options: LaunchOptions) -> None:
    with pytest.raises(ConfigError):
        make_plan(command, load_recipe("demo"), options, TOOLS, "L")


def test_ranks_are_told_how_many_threads_to_use_so_that_numbers_do_not_follow_the_machine() -> None:
    assert rank_environment(load_recipe("demo", ["launch.threads_per_rank=3"]))["OMP_NUM_THREADS"] == "3"
