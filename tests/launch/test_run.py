"""The launcher with real processes: what it believes, whom it blames, and that nothing is left behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.commands import environment, find_tools
from launch.hosts import Host
from launch.liveness import RunFolder
from launch.plan import LaunchPlan, RankProgram, mpirun_plan, single_plan
from launch.recipe import load_recipe, write_config
from launch.run import Launch, last_unit, run_plan
from launch.watch import Watcher
from nd_dist.config import Config
from nd_dist.errors import DataError, RankFailure, WorldError
from nd_dist.events import EventLog, events_path, read_events


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = load_recipe("demo", [f"run_dir={tmp_path / 'run'}"])
    write_config(config)
    return config


def plan_of(config: Config, behaviour: str, ranks: int, launch_id: str = "L") -> LaunchPlan:
    options = ("--behaviour", behaviour)
    program = RankProgram("tests.support.rank_program", config.run_dir / "config.yaml", launch_id, options)
    tools = find_tools()
    if ranks == 1:
        return single_plan(program, tools, {})
    return mpirun_plan(program, tools, {}, (Host("localhost", ranks),), None)


def run(config: Config, plan: LaunchPlan, launch_id: str = "L") -> str:
    text = io.StringIO()
    run_plan(Launch("sleepy", config.run_dir, launch_id, plan), Watcher(Console(file=text)), environment())
    return text.getvalue()


def rank_pids(config: Config, ranks: int) -> list[int]:
    events = [event for rank in range(ranks) for event in read_events(events_path(config.run_dir, rank))]
    return [event["pid"] for event in events if event["event"] == "rank_start"]


def assert_gone(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "ranks were left behind"
        time.sleep(0.1)


def test_ranks_that_finish_are_believed_and_their_progress_is_shown(config: Config) -> None:
    assert "sleepy: 1/1" in run(config, plan_of(config, "finish", 2))


def test_the_error_of_one_rank_ends_all_and_keeps_its_class_and_message(config: Config) -> None:
    with pytest.raises(DataError, match=r"Rank 1 on .*A shard is damaged") as caught:
        run(config, plan_of(config, "raise", 2))
    assert caught.value.exit_code == 3
    assert_gone(rank_pids(config, 2))


def test_a_crash_is_a_rank_failure_with_the_tail_of_its_log(config: Config) -> None:
    with pytest.raises(RankFailure, match="boom") as caught:
        run(config, plan_of(config, "crash", 2))
    assert caught.value.exit_code == 4
    assert "rank-0001.log" in str(caught.value)
    assert_gone(rank_pids(config, 2))


def test_exit_code_zero_without_a_completion_record_is_a_failure(config: Config) -> None:
    silent = LaunchPlan((sys.executable, "-c", "pass"), {}, 1)
    with pytest.raises(RankFailure, match="without finishing"):
        run(config, silent)


def test_a_completion_record_of_an_earlier_launch_is_not_believed(config: Config) -> None:
    run(config, plan_of(config, "finish", 1))
    with pytest.raises(RankFailure):
        run(config, LaunchPlan((sys.executable, "-c", "pass"), {}, 1), launch_id="L2")


def start_launcher(config: Config) -> subprocess.Popen[bytes]:
    words = json.dumps(list(plan_of(config, "hang", 2).argv))
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from launch.commands import environment\nfrom launch.plan import LaunchPlan\n"
        "from launch.run import Launch, run_plan\nfrom launch.watch import Watcher\n"
        f"plan = LaunchPlan(tuple(json.loads({words!r})), {{}}, 2)\n"
        f"run_plan(Launch('sleepy', Path({str(config.run_dir)!r}), 'L', plan), Watcher(Console()), environment())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(environment()), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(rank_pids(config, 2)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_sigterm_to_the_launcher_lets_the_ranks_save_and_leaves_none_behind(config: Config) -> None:
    process = start_launcher(config)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=40)
    assert b"Requeue" in text
    assert_gone(rank_pids(config, 2), within_s=1)


def test_kill_9_of_the_launcher_takes_its_ranks_with_it(config: Config) -> None:
    process = start_launcher(config)
    process.kill()
    process.communicate(timeout=10)
    assert_gone(rank_pids(config, 2))
    run(config, plan_of(config, "finish", 1, "again"), launch_id="again")


def test_two_launchers_do_not_work_in_one_run_folder(config: Config) -> None:
    process = start_launcher(config)
    try:
        with pytest.raises(WorldError, match="Another command works"):
            RunFolder(config.run_dir, "other")
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=40)


def test_the_unit_that_a_lost_rank_was_working_on_is_known_from_its_events(tmp_path: Path) -> None:
    events = EventLog(tmp_path, 1, "evaluate")
    events.write("rank_start", launch="old", host="node1", pid=1, size=2)
    events.write("unit_began", phase="reconstruct", unit="unguided_subj01_00000")
    assert last_unit(tmp_path, 1, "new") == "", "an earlier launch's rank is not this one's"
    events.write("rank_start", launch="new", host="node2", pid=2, size=2)
    assert last_unit(tmp_path, 1, "new") == "rank 1 on node2"
    for number in (3, 4):
        events.write("unit_began", phase="reconstruct", unit=f"unguided_subj01_0000{number}")
    assert last_unit(tmp_path, 1, "new") == "rank 1 on node2 in unit unguided_subj01_00004"
