"""Who is alive: ranks that leave without a word or never start, and what watching hundreds of them costs."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from launch.plans.environment import environment
from launch.plans.plan import LaunchPlan
from launch.supervise.guard import Guard, fork_rank
from launch.supervise.heartbeat import Heartbeat, launch_record_path
from launch.supervise.lock import RunFolder
from launch.supervise.outcome import tail_of
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import EventTail, Watcher
from nd_dist.config import Config
from nd_dist.errors import RankFailure
from nd_dist.events import EventLog
from tests.support.rank_processes import assert_gone, plan_of, rank_pids


def run(config: Config, plan: LaunchPlan, start_s: float = 600) -> None:
    launch = Launch("rank_program", config.run_dir, "L", plan, start_s=start_s)
    run_plan(launch, Watcher(Console(file=io.StringIO())), environment())


@pytest.fixture
def heartbeat(tmp_path: Path) -> Iterator[Heartbeat]:
    """The heartbeat of a launcher that lives and wants nothing; a guard's signal mask ends with the test."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    folder = RunFolder(tmp_path, "L")
    yield Heartbeat(tmp_path, "L")
    folder.release()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize(("code", "reported"), [(15, 15), (0, 4)])
def test_the_guard_reports_a_rank_that_left_without_saying_how_it_ended(
    code: int, reported: int, heartbeat: Heartbeat
) -> None:
    said: list[str] = []
    pid = fork_rank()
    if pid == 0:
        os._exit(code)
    assert Guard(pid, heartbeat, said.append).watch() == reported
    assert said == [f"it exited with code {code} and did not say how it ended"]


def test_the_guard_says_nothing_of_a_rank_that_has_said_how_it_ended(heartbeat: Heartbeat) -> None:
    said: list[str] = []
    pid = fork_rank()
    if pid == 0:
        os._exit(3)
    assert Guard(pid, heartbeat, said.append, has_said_end=lambda: True).watch() == 3
    assert said == []


@pytest.mark.launch
@pytest.mark.parametrize("code", ["15", "0"])
def test_a_rank_that_leaves_while_the_others_wait_for_it_in_mpi_ends_a_leased_launch(
    config: Config, code: str
) -> None:
    plan = plan_of(config, "leave", 2, "L", code, is_leased=True)
    with pytest.raises(
        RankFailure, match=rf"Rank 1 on .* exited with code {code} .* ends with: Abort\(15\) on node 0"
    ):
        run(config, plan)
    assert_gone(rank_pids(config, 2))


def test_a_library_that_calls_sys_exit_fails_its_rank_and_is_no_stop_on_request(config: Config) -> None:
    with pytest.raises(RankFailure, match="a library had enough"):
        run(config, plan_of(config, "sys-exit", 1))


def test_ranks_that_do_not_start_in_time_are_named_in_one_message(config: Config) -> None:
    with pytest.raises(
        RankFailure, match=r"3 of 3 ranks never started within 1 s: rank\(s\) 0, 1, 2 on this machine"
    ) as caught:
        run(config, LaunchPlan(("sh", "-c", "echo waiting for resources; sleep 600"), {}, 3), start_s=1)
    assert "waiting for resources" in str(caught.value)
    assert "launch.start_s" in str(caught.value)


def test_of_a_progress_bar_only_what_it_shows_last_is_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\nLoading: 0%\rLoading: 100%\n\n")
    assert tail_of(log, 1) == "    | Loading: 100%"
    log.write_bytes(b"")
    assert tail_of(log, 1) == ""


OPENS = """
import io, sys
from pathlib import Path
from rich.console import Console
from launch.plans.plan import LaunchPlan
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher

run_dir, ranks = Path(sys.argv[1]), int(sys.argv[2])
opened, begun = [0], []

def count(event, words):
    if event == "subprocess.Popen":
        begun.append(True)
    if begun and event == "open" and "/events/" in str(words[0]):
        opened[0] += 1

sys.addaudithook(count)
try:
    plan = LaunchPlan(("sleep", "6"), {}, ranks)
    run_plan(Launch("train", run_dir, "L", plan), Watcher(Console(file=io.StringIO())), {})
finally:
    print(opened[0])
"""


def test_watching_hundreds_of_quiet_ranks_opens_few_of_their_files(tmp_path: Path) -> None:
    opened = {}
    for ranks in (8, 512):
        for rank in range(ranks):
            EventLog(tmp_path / str(ranks), rank, "train").write("old")
        words = [sys.executable, "-c", OPENS, str(tmp_path / str(ranks)), str(ranks)]
        opened[ranks] = int(subprocess.run(words, capture_output=True, text=True, check=False).stdout)
    assert opened[8] > 2 * 8, "few files are opened at every look"
    assert 512 <= opened[512] < 2 * 512, "each once at the end; before that sixteen a second"


def test_an_event_is_found_by_the_size_of_its_file_alone(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 0, "train")
    log.write("old")
    tail = EventTail(tmp_path / "events" / "rank-0000.jsonl")
    assert tail.read(must_open=False) == []
    log.write("new")
    assert [event["event"] for event in tail.read(must_open=False)] == ["new"]


def test_the_more_ranks_look_at_the_launch_record_the_less_often_each_of_them_opens_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "L")
    path, hidden = launch_record_path(tmp_path), tmp_path / "hidden"
    try:
        alone, one_of_many = Heartbeat(tmp_path, "L"), Heartbeat(tmp_path, "L", ranks=512)
        assert [alone.look(), one_of_many.look()] == ["run", "run"]
        folder.tell("stop")
        looks = [(alone.look(), one_of_many.look()) for _ in range(5)]
        assert looks == [("stop", "run")] * 4 + [("stop", "stop")]
        path.rename(hidden)
        ends = [(alone.look(), one_of_many.look()) for _ in range(15)]
        assert [ends.index(("end", "stop")), ends.index(("end", "end"))] == [6, 9]
        hidden.rename(path)
    finally:
        folder.release()


def test_a_rank_that_sees_other_process_ids_than_its_launcher_goes_by_the_heartbeat_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "L")
    path = launch_record_path(tmp_path)
    try:
        record = {**json.loads(path.read_text()), "pid": 2**22 + 1}  # no such process: the launcher is gone
        path.write_text(json.dumps(record))
        assert Heartbeat(tmp_path, "L").look() == "end"
        path.write_text(json.dumps({**record, "pid_namespace": record["pid_namespace"].replace("pid:[", "pid:[9")}))
        assert Heartbeat(tmp_path, "L").look() == "run"
    finally:
        folder.release()
