"""Where a command runs, and what starts its ranks."""

import itertools
import os
import socket
from pathlib import Path

import pytest

from launch.grid.plan import GridRequest
from launch.grid.run import make_grid
from launch.plans.choose import LaunchOptions, choose, make_plan, require_head
from launch.plans.environment import is_foreign
from launch.plans.hosts import Host
from launch.plans.tools import Tools
from launch.recipe import load_recipe
from nd_dist.config import Config
from nd_dist.errors import ConfigError, WorldError

CONFIG = load_recipe("demo")
TOOLS = Tools("/env/bin/python", "/env/bin/mpirun", "mpich", 29501, "", "/usr/bin/mpirun", "/usr/bin:/bin")
NODES = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
         "SLURM_TASKS_PER_NODE": "3,1", "SLURM_NTASKS": "4"}  # fmt: skip


@pytest.fixture(autouse=True)
def _shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell without any launcher's or scheduler's variables."""
    for name in [name for name in os.environ if is_foreign(name) or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)


@pytest.fixture
def path_with_srun(tmp_path: Path) -> str:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    return str(tmp_path)


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_auto_takes_every_node_of_a_slurm_allocation(path_with_srun: str) -> None:
    environ = {**NODES, "PATH": path_with_srun}
    for command in ("pack", "train", "evaluate", "sweep"):
        chosen = choose(command, CONFIG, LaunchOptions(), environ)
        assert (chosen.launcher, chosen.hosts, chosen.note) == ("srun", (Host("n1", 3), Host("n2", 1)), "")
    assert choose("train", CONFIG, LaunchOptions(include="n2"), environ).hosts == (Host("n2", 1),)


def test_a_note_says_when_fewer_ranks_start_than_the_allocation_has_tasks_or_gpus(path_with_srun: str) -> None:
    environ = {**NODES, "PATH": path_with_srun}
    assert "2 rank(s), where the allocation has 4 task(s)" in choose("train", CONFIG, LaunchOptions(2), environ).note
    assert "16 GPU(s)" in choose("train", CONFIG, LaunchOptions(), {**environ, "SLURM_GPUS_ON_NODE": "8"}).note


def test_auto_in_a_step_of_srun_uses_this_machine_and_says_so(path_with_srun: str) -> None:
    step = {**NODES, "PATH": path_with_srun, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    chosen = choose("evaluate", CONFIG, LaunchOptions(2), step)
    assert (chosen.launcher, chosen.hosts) == ("local", (Host("localhost", 2),))
    assert "1 of this allocation's 2 nodes" in chosen.note
    without_srun = choose("train", CONFIG, LaunchOptions(2), {**NODES, "PATH": "/nowhere"})
    assert without_srun.launcher == "local"


def test_auto_takes_the_hosts_of_pbs_and_goes_there_over_ssh(tmp_path: Path) -> None:
    environ = {"PBS_NODEFILE": str(hostfile(tmp_path, "a\na\nb\nb\n"))}
    pair = (Host("a", 2), Host("b", 2))
    assert choose("train", CONFIG, LaunchOptions(4), environ).hosts == pair
    assert choose("train", CONFIG, LaunchOptions(4), environ).launcher == "deepspeed-pdsh"
    assert choose("evaluate", CONFIG, LaunchOptions(), environ).launcher == "mpirun"
    assert choose("train", CONFIG, LaunchOptions(launcher="deepspeed-openmpi"), environ).hosts == pair
    assert choose("train", CONFIG, LaunchOptions(2, launcher="local"), environ).hosts == (Host("localhost", 2),)
    alone = {"LSB_MCPU_HOSTS": f"{socket.gethostname()} 3"}
    assert choose("train", CONFIG, LaunchOptions(), alone).hosts == (Host(socket.gethostname(), 3),)
    assert choose("train", CONFIG, LaunchOptions(), alone).launcher == "local"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", socket.gethostname()])
def test_a_hostfile_of_this_machine_alone_needs_no_ssh(name: str, tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=hostfile(tmp_path, f"{name} slots=2\n"))
    train = make_plan("train", CONFIG, options, TOOLS, "L")
    assert "deepspeed.launcher.launch" in train.argv
    assert (train.ranks, train.hosts) == (2, ())
    assert make_plan("pack", CONFIG, options, TOOLS, "L").argv[:5] == (
        "/env/bin/mpirun",
        "-n",
        "2",
        "-launcher",
        "fork",
    )
    chosen = LaunchOptions(hostfile=options.hostfile, include=f"{name.strip('[]')}:1")
    assert make_plan("train", CONFIG, chosen, TOOLS, "L").env["CUDA_VISIBLE_DEVICES"] == "1"


def test_auto_takes_pdsh_for_training_and_mpirun_for_the_rest_where_there_are_hosts(tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=hostfile(tmp_path, "a\nb\n"))
    assert [choose(command, CONFIG, options, NODES).launcher for command in ("train", "pack")] == [
        "deepspeed-pdsh", "mpirun",
    ]  # fmt: skip
    assert choose("train", CONFIG, LaunchOptions(2), {}).launcher == "local"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", LaunchOptions(launcher="mpirun")),
        ("pack", LaunchOptions(launcher="deepspeed-pdsh", hostfile=Path("hosts"))),
        ("pack", LaunchOptions(launcher="bsub")),
        ("train", LaunchOptions(launcher="deepspeed-mpich", hostfile=Path("hosts"))),
        ("pack", LaunchOptions(launcher="local", hostfile=Path("hosts"))),
        ("train", LaunchOptions(launcher="srun", hostfile=Path("hosts"))),
        ("train", LaunchOptions(launcher="deepspeed-openmpi")),
        ("train", LaunchOptions(2, include="node1")),
        ("train", LaunchOptions(launcher="srun")),
    ],
)
def test_a_launcher_that_cannot_start_a_command_is_refused(command: str, options: LaunchOptions) -> None:
    with pytest.raises(ConfigError):
        make_plan(command, CONFIG, options, TOOLS, "L")


CHANGES = {"ranks": 2, "hostfile": "other", "launcher": "deepspeed-openmpi", "include": "a:1", "exclude": "a:0"}
STARTS = ("pack", "train", "evaluate", "sweep", "estimate", "grid")


@pytest.mark.parametrize(("command", "option"), list(itertools.product(STARTS, CHANGES)))
def test_every_option_of_every_launching_command_changes_the_plan_or_is_refused(
    command: str, option: str, tmp_path: Path
) -> None:
    def plan(config: Config, options: LaunchOptions) -> object:
        if command == "grid":
            grid = make_grid(config, GridRequest(stages=(1,)), options)
            return grid.slots, [grid.words(training)[4:] for training in grid.plan]
        return make_plan(command, config, options, TOOLS, "L")

    (tmp_path / "other").write_text("c slots=2\nd slots=2\n")
    value = tmp_path / "other" if option == "hostfile" else CHANGES[option]
    base = {"hostfile": hostfile(tmp_path, "a slots=2\nb slots=2\n")}
    before = plan(CONFIG, LaunchOptions(**base))  # type: ignore[arg-type]
    try:
        after = plan(CONFIG, LaunchOptions(**{**base, option: value}))  # type: ignore[arg-type]
    except ConfigError:
        return
    assert after != before


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "0", "PMI_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"RANK": "1"},
    ],
)
def test_nd_started_as_a_rank_says_what_to_run_instead(environ: dict[str, str]) -> None:
    with pytest.raises(WorldError, match=r"python -m launch\.join train RECIPE"):
        require_head("train", environ)


@pytest.mark.parametrize(
    "environ", [{}, {"SLURM_PROCID": "0"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
                {"RANK": "0", "WORLD_SIZE": "1"}],
)  # fmt: skip
def test_nd_alone_is_no_rank(environ: dict[str, str]) -> None:
    require_head("train", environ)
