import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plans.choose import NO_MPI_NOTE, LaunchOptions, make_plan
from launch.plans.deepspeed import SSH_OPTIONS, deepspeed_plan, local_deepspeed_plan
from launch.plans.environment import rank_environment
from launch.plans.hosts import Host, host_of_rank
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import RankProgram, plain_word, single_plan, text_of_word
from launch.plans.slurm import srun_plan
from launch.plans.tools import Tools
from launch.recipe import load_recipe
from launch.supervise.checks import check_metrics
from launch.supervise.preflight import require_starters
from nd_dist.config import EvaluationConfig, SlurmConfig
from nd_dist.errors import ConfigError, DataError

HOSTILE = Path("/data/a run with $HOME, 'quotes' and %h/config.yaml")
PROGRAM = RankProgram("launch.ranks.train", Path("/runs/a/config.yaml"), "L1")
HOSTILE_PROGRAM = RankProgram("launch.ranks.train", HOSTILE, "L1")
RANK = ["launch.ranks.rank", "launch.ranks.train", "/runs/a/config.yaml", "L1"]
TOOLS = Tools("/env/bin/python", "/env/bin/mpirun", "mpich", 29501, "10.0.0.1", "/usr/bin/mpirun", "/usr/bin:/bin")
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/code"}
SLURM = SlurmConfig()
TWO_HOSTS = (Host("node1", 2), Host("node2", 2))
DEEPSPEED = ["/env/bin/python", "-m", "deepspeed.launcher.runner"]
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
DEEPSPEED_LAUNCHERS = ["deepspeed-pdsh", "deepspeed-openmpi"]


def test_a_local_deepspeed_plan_is_the_documented_command() -> None:
    plan = local_deepspeed_plan(PROGRAM, TOOLS, ENV, Host("localhost", 2))
    assert plan.ranks == 2
    assert list(plan.argv) == [
        "/env/bin/python", "-m", "deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19",
        "--master_addr=127.0.0.1", "--master_port=29501", "--no_local_rank", "--module", *RANK,
    ]  # fmt: skip


def test_a_pdsh_plan_names_each_slot_and_where_to_meet() -> None:
    plan = deepspeed_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, "deepspeed-pdsh")
    assert list(plan.argv) == [
        *DEEPSPEED, "--hostfile", "/runs/a/.state/hostfile", "--force_multi", "--master_addr", "10.0.0.1",
        "--launcher", "pdsh", "--master_port", "29501", "--no_local_rank", "--module", *RANK,
    ]  # fmt: skip
    assert plan.ranks == 4
    assert plan.env == {**ENV, **MEETING}
    assert plan.own_env == {"PDSH_SSH_ARGS_APPEND": SSH_OPTIONS, "DS_ENV_FILE": "/dev/null"}
    assert plan.files == {Path("/runs/a/.state/hostfile"): "node1 slots=2\nnode2 slots=2\n"}


def test_chosen_gpus_reach_deepspeed_and_its_hostfile_has_enough_slots_for_them() -> None:
    plan = deepspeed_plan(PROGRAM, TOOLS, ENV, (Host("node1", 2, (1, 3)), Host("node2", 1)), "deepspeed-pdsh")
    assert plan.argv[plan.argv.index("--include") + 1] == "node1:1,3@node2:0"
    assert plan.files == {Path("/runs/a/.state/hostfile"): "node1 slots=4\nnode2 slots=1\n"}


def test_an_openmpi_plan_carries_the_rendezvous_that_deepspeed_forgets() -> None:
    plan = deepspeed_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, "deepspeed-openmpi")
    (given,) = [word for word in plan.argv if word.startswith("--launcher_args=")]
    assert shlex.split(given.removeprefix("--launcher_args=")) == [
        "-x", "MASTER_ADDR=10.0.0.1", "-x", "MASTER_PORT=29501", "--mca", "plm_rsh_args", SSH_OPTIONS,
    ]  # fmt: skip
    assert plan.own_env["PATH"] == "/usr/bin:/usr/bin:/bin"
    assert "--include" not in plan.argv


def test_deepspeeds_own_parser_reads_every_plan_back() -> None:
    plans = [deepspeed_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, launcher) for launcher in DEEPSPEED_LAUNCHERS]
    code = (
        "import json, sys\nfrom deepspeed.launcher.runner import parse_args\n"
        "read = [parse_args(words) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[a.launcher, a.master_addr, a.master_port, a.user_script, a.user_args] for a in read]))\n"
    )
    words = [sys.executable, "-c", code, json.dumps([plan.argv[3:] for plan in plans])]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    for launcher, plan, found in zip(DEEPSPEED_LAUNCHERS, plans, json.loads(answer), strict=True):
        name, address, port, script, arguments = found
        assert (name, address, port) == (launcher.removeprefix("deepspeed-"), "10.0.0.1", 29501)
        assert (script, arguments[-3:]) == (plan.argv[-4], RANK[1:])


def test_mpich_and_openmpi_get_their_own_flags() -> None:
    mpich = mpirun_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, is_remote=True)
    assert mpich.argv == (
        "/env/bin/mpirun", "-n", "4", "-launcher", "ssh", "-rmk", "user", "-hosts", "node1:2,node2:2",
        "/env/bin/python", "-m", *RANK,
    )  # fmt: skip
    here = mpirun_plan(PROGRAM, TOOLS, ENV, (Host("localhost", 2),))
    assert here.argv[:5] == ("/env/bin/mpirun", "-n", "2", "-launcher", "fork")
    openmpi = mpirun_plan(PROGRAM, Tools("python", "mpirun", "openmpi"), ENV, TWO_HOSTS, is_remote=True)
    assert openmpi.argv == (
        "mpirun", "-n", "4", "--allow-run-as-root", "--oversubscribe", "-x", "PYTHONPATH",
        "--host", "node1:2,node2:2", "python", "-m", *RANK,
    )  # fmt: skip


def test_a_chosen_interface_reaches_mpi_gloo_and_nccl() -> None:
    env = rank_environment(load_recipe("demo", ["launch.interface=ib0"]), {})
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    mpich = mpirun_plan(PROGRAM, TOOLS, env, TWO_HOSTS, is_remote=True).argv
    assert mpich[mpich.index("-iface") + 1] == "ib0"
    openmpi = deepspeed_plan(PROGRAM, TOOLS, env, TWO_HOSTS, "deepspeed-openmpi").argv
    assert any("btl_tcp_if_include ib0" in word for word in openmpi)


def test_srun_starts_one_rank_per_slot_on_the_named_nodes_and_they_need_no_mpi() -> None:
    plan = srun_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, SLURM, is_train=True)
    assert plan.argv == (
        "srun", "--nodes", "2", "--ntasks", "4", "--nodelist", "node1,node2", "--ntasks-per-node", "2",
        "--distribution=block", "--mpi=none", "--kill-on-bad-exit=1", "--cpu-bind=none", "--overlap",
        "/env/bin/python", "-m", *RANK,
    )  # fmt: skip
    assert plan.env == {**ENV, **MEETING}


def test_srun_is_given_the_node_of_each_rank_where_they_take_different_numbers() -> None:
    plan = srun_plan(PROGRAM, TOOLS, ENV, (Host("node1", 3), Host("node2", 1)), SLURM, is_train=True)
    assert "--distribution=arbitrary" in plan.argv
    assert not {"--ntasks-per-node", "--nodelist"} & set(plan.argv)
    order = Path("/runs/a/.state/ranks-by-host")
    assert (plan.own_env, plan.files) == ({"SLURM_HOSTFILE": str(order)}, {order: "node1\nnode1\nnode1\nnode2\n"})


@pytest.mark.parametrize("text", ["/plain/path-1.yaml", str(HOSTILE), "", "base64:x", "ü", "a\nb", "%n", "$(reboot)"])
def test_a_word_on_its_way_to_a_rank_survives_every_shell(text: str) -> None:
    word = plain_word(text)
    assert text_of_word(word) == text
    assert shlex.split(word) == [word]
    assert not set(word) & set("%$'\" \\;&|<>()*?#~`\n")


@pytest.mark.parametrize("launcher", DEEPSPEED_LAUNCHERS)
def test_a_hostile_run_folder_is_one_plain_word_for_the_rank(launcher: str) -> None:
    plan = deepspeed_plan(HOSTILE_PROGRAM, TOOLS, ENV, TWO_HOSTS, launcher)
    assert text_of_word(plan.argv[-2]) == str(HOSTILE)


def test_a_python_that_pdshs_shell_would_change_is_refused() -> None:
    with pytest.raises(ConfigError, match="through a shell"):
        deepspeed_plan(PROGRAM, Tools("/my env/bin/python"), ENV, TWO_HOSTS, "deepspeed-pdsh")
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        deepspeed_plan(PROGRAM, TOOLS, {"PYTHONPATH": "/co%de"}, TWO_HOSTS, "deepspeed-pdsh")


def test_what_a_launcher_cannot_express_is_refused() -> None:
    chosen = (Host("a", 1, (3,)), Host("b", 1))
    with pytest.raises(ConfigError, match="cannot choose GPUs"):
        deepspeed_plan(PROGRAM, TOOLS, ENV, chosen, "deepspeed-openmpi")
    with pytest.raises(ConfigError, match="cannot choose GPUs"):
        mpirun_plan(PROGRAM, TOOLS, ENV, chosen, is_remote=True)
    with pytest.raises(ConfigError, match="cannot choose GPUs"):
        srun_plan(PROGRAM, TOOLS, ENV, chosen, SLURM, is_train=True)
    for odd in (Host("a", 1, (3,), user="me"), Host("fd00::1", 1, (3,))):
        with pytest.raises(ConfigError, match="by their names alone"):
            deepspeed_plan(PROGRAM, TOOLS, ENV, (odd, Host("b", 1)), "deepspeed-pdsh")
    openmpi = Tools("python", "mpirun", "openmpi")
    for tools, odd in ((TOOLS, Host("fd00::1", 1)), (openmpi, Host("a", 1, user="me"))):
        with pytest.raises(ConfigError, match="by their names alone"):
            mpirun_plan(PROGRAM, tools, ENV, (odd, Host("b", 1)), is_remote=True)


def test_pdsh_and_mpich_are_given_the_user_of_a_host() -> None:
    hosts = (Host("node1", 2, user="me"), Host("node2", 2))
    plan = deepspeed_plan(PROGRAM, TOOLS, ENV, hosts, "deepspeed-pdsh")
    assert plan.files == {Path("/runs/a/.state/hostfile"): "me@node1 slots=2\nnode2 slots=2\n"}
    assert "me@node1:2,node2:2" in mpirun_plan(PROGRAM, TOOLS, ENV, hosts, is_remote=True).argv


def test_a_missing_mpi_is_said_with_how_to_install_it() -> None:
    bare = Tools("python")
    with pytest.raises(ConfigError, match="install one"):
        deepspeed_plan(PROGRAM, bare, ENV, TWO_HOSTS, "deepspeed-openmpi")
    with pytest.raises(ConfigError, match="install one"):
        mpirun_plan(PROGRAM, bare, ENV, TWO_HOSTS)


def test_the_printed_line_splits_back_into_the_same_words_whatever_the_path_holds() -> None:
    plan = single_plan(HOSTILE_PROGRAM, TOOLS, {"NOTE": "two $words"})
    words = shlex.split(plan.shell())
    assert words == ["NOTE=two $words", *plan.argv]


@pytest.mark.parametrize("command", ["pack", "evaluate", "sweep"])
def test_without_mpi_one_process_does_the_work_and_says_so(command: str) -> None:
    plan = make_plan(command, load_recipe("demo"), LaunchOptions(ranks=2), Tools("python"), "L")
    assert plan.ranks == 1
    assert plan.note == NO_MPI_NOTE


def test_one_rank_needs_no_launcher() -> None:
    for command in ("pack", "train", "evaluate"):
        plan = make_plan(command, load_recipe("demo"), LaunchOptions(ranks=1), TOOLS, "L")
        assert plan.argv[:4] == ("/env/bin/python", "-m", "launch.ranks.rank", f"launch.ranks.{command}")


def test_ranks_come_from_the_option_then_from_the_recipe(tmp_path: Path) -> None:
    config = load_recipe("demo", ["launch.ranks=3"])
    assert make_plan("pack", config, LaunchOptions(), TOOLS, "L").ranks == 3
    assert make_plan("pack", config, LaunchOptions(ranks=2), TOOLS, "L").ranks == 2
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=4\nb slots=4\n")
    assert make_plan("pack", load_recipe("demo"), LaunchOptions(hostfile=hostfile), TOOLS, "L").ranks == 8
    assert make_plan("pack", config, LaunchOptions(ranks=5, hostfile=hostfile), TOOLS, "L").ranks == 5
    left = LaunchOptions(hostfile=hostfile, exclude="a")
    assert "b:4" in make_plan("pack", load_recipe("demo"), left, TOOLS, "L").argv


def test_ranks_are_told_how_many_threads_to_use_so_that_numbers_do_not_follow_the_machine() -> None:
    env = rank_environment(load_recipe("demo", ["launch.threads_per_rank=3"]), {"OMP_NUM_THREADS": "64"})
    assert env["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("num_hosts", "slots"), [(8, 8), (64, 8)])
def test_plans_of_64_and_512_ranks_place_every_rank_once(num_hosts: int, slots: int) -> None:
    hosts = tuple(Host(f"gpu{number:03d}", slots) for number in range(num_hosts))
    ranks = num_hosts * slots
    plans = [
        *(deepspeed_plan(PROGRAM, TOOLS, ENV, hosts, launcher) for launcher in DEEPSPEED_LAUNCHERS),
        mpirun_plan(PROGRAM, TOOLS, ENV, hosts, is_remote=True),
        srun_plan(PROGRAM, TOOLS, ENV, hosts, SLURM, is_train=True),
    ]
    for plan in plans:
        assert plan.ranks == ranks
        assert [host_of_rank(plan.hosts, rank) for rank in range(ranks)] == [
            host.name for host in hosts for _ in range(slots)
        ]
        assert sum(map(len, plan.argv)) < 100_000  # a line that Linux takes


def test_a_missing_pdsh_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install pdsh"):
        require_starters(deepspeed_plan(PROGRAM, TOOLS, ENV, TWO_HOSTS, "deepspeed-pdsh"))


def test_a_protocol_groups_or_judges_that_are_not_there_are_refused_before_ranks_start(tmp_path: Path) -> None:
    check_metrics(EvaluationConfig(protocol="takagi"))
    with pytest.raises(ConfigError, match="metric protocol does not exist"):
        check_metrics(EvaluationConfig(protocol="takagy"))
    with pytest.raises(ConfigError, match="metric networks"):
        check_metrics(EvaluationConfig(judges_dir=tmp_path / "nothing"))
    with pytest.raises(DataError, match="names groups or classes of images is missing"):
        check_metrics(EvaluationConfig(image_groups=tmp_path / "nothing.json"))
