"""The launcher with real processes: what it believes, whom it blames, and that nothing is left behind."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.plans.environment import environment
from launch.plans.plan import LaunchPlan, RankProgram, single_plan
from launch.plans.tools import find_tools
from launch.supervise.heartbeat import launch_record_path
from launch.supervise.lock import RunFolder
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher
from nd_dist.config import Config, LaunchConfig
from nd_dist.errors import DataError, RankFailure, WorldError
from nd_dist.events import events_path, read_events
from nd_dist.files import read_json
from tests.support.rank_processes import assert_gone, plan_of, rank_pids, start_launcher
from tests.support.waiting import HANG_S, wait_until


def run(config: Config, plan: LaunchPlan, launch_id: str = "L") -> str:
    text = io.StringIO()
    run_plan(Launch("rank_program", config.run_dir, launch_id, plan), Watcher(Console(file=text)), environment())
    return text.getvalue()


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
    with pytest.raises(RankFailure, match="never started"):
        run(config, silent)


def test_a_completion_record_of_an_earlier_launch_is_not_believed(config: Config) -> None:
    run(config, plan_of(config, "finish", 1))
    with pytest.raises(RankFailure):
        run(config, LaunchPlan((sys.executable, "-c", "pass"), {}, 1), launch_id="L2")


def test_sigterm_to_the_launcher_lets_the_ranks_save_and_leaves_none_behind(config: Config) -> None:
    process = start_launcher(config)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=HANG_S)
    assert b"Requeue" in text
    assert_gone(rank_pids(config, 2))


def test_under_nohup_a_closed_terminal_stops_nothing_and_other_signals_do(config: Config) -> None:
    process = start_launcher(config, before=("nohup",))
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        each.send_signal(signal.SIGHUP)
    time.sleep(3)  # every guard has looked at its signals by then
    assert all(each.is_running() for each in tree)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=HANG_S)
    assert b"Stopped by SIGTERM" in text
    assert_gone(rank_pids(config, 2))


def test_ranks_of_another_world_than_the_launchs_are_refused_before_their_work(config: Config) -> None:
    with pytest.raises(WorldError, match=r"another number of ranks(.|\n)*"):
        run(config, replace(plan_of(config, "finish", 2), ranks=3))
    assert not [event for event in read_events(events_path(config.run_dir, 0)) if event["event"] == "progress"]


def test_a_rank_that_ignores_the_stop_is_killed_after_the_grace(config: Config) -> None:
    process = start_launcher(config, "deaf", grace_s=2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG_S)
    assert_gone(rank_pids(config, 2))


def test_a_second_signal_does_not_wait_for_the_grace(config: Config) -> None:
    process = start_launcher(config, "deaf")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: read_json(launch_record_path(config.run_dir))["wanted"] == "stop")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG_S)  # the grace is longer
    assert_gone(rank_pids(config, 2))


def test_a_rank_that_a_signal_kills_is_named_with_the_signal(config: Config) -> None:
    with pytest.raises(RankFailure, match=r"Rank 0 on .* killed by SIGABRT") as caught:
        run(config, plan_of(config, "abort", 1))
    assert caught.value.exit_code == 4


class ClockOfPolls:
    """Stands still until a rank runs, then counts the launcher's looks: a slow start is no silence."""

    def __init__(self, config: Config) -> None:
        self._config, self._now = config, 0.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self._now += seconds if rank_pids(self._config, 1) else 0.0


def test_ranks_that_say_nothing_for_the_stated_time_are_ended_and_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.supervise.run.time", ClockOfPolls(config))
    launch = Launch("rank_program", config.run_dir, "L", plan_of(config, "deaf", 1), silence_s=2)
    with pytest.raises(RankFailure, match=r"Rank 0 on .* went silent(.|\n)*last event was rank_start"):
        run_plan(launch, Watcher(Console(file=io.StringIO())), environment())
    assert_gone(rank_pids(config, 1))


def test_a_rank_that_hangs_when_all_work_is_done_is_ended_and_costs_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.supervise.run.LATE_S", 1.0)
    plan = replace(plan_of(config, "deaf-last", 2), is_leased=True)
    launch = Launch("rank_program", config.run_dir, "L", plan)
    assert run_plan(launch, Watcher(Console(file=io.StringIO())), environment()) == [1]
    assert_gone(rank_pids(config, 2))


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_good_is_ended_and_named(config: Config) -> None:
    with pytest.raises(RankFailure, match=r"Rank 1 on .* stopped \(SIGSTOP\)"):
        run(config, plan_of(config, "pause", 2))
    assert_gone(rank_pids(config, 2))


def test_ranks_work_in_the_callers_folder_with_the_plans_variables(config: Config) -> None:
    plan = plan_of(config, "environment", 1)
    hostile = "two words; $HOME 'quotes' %h"
    argv = (*plan.argv, "NCCL_NOTE")
    run(config, LaunchPlan(argv, {"NCCL_NOTE": hostile}, 1))
    found = [event for event in read_events(events_path(config.run_dir, 0)) if event["event"] == "environment"][-1]
    assert (found["cwd"], found["variables"]) == (os.getcwd(), {"NCCL_NOTE": hostile})


def test_what_the_starting_process_put_into_a_session_of_its_own_is_killed_too(config: Config) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
    plan = LaunchPlan((sys.executable, "-c", code, "sleep", str(2 * HANG_S)), {}, 1)
    others = subprocess.Popen(["sleep", str(2 * HANG_S)])
    try:
        with pytest.raises(RankFailure, match="never started"):
            run(config, plan)
        left = int((config.run_dir / "logs" / "rank_program" / "launcher.log").read_text())
        assert not psutil.pid_exists(left)
        assert others.poll() is None
    finally:
        others.kill()
        others.wait()


def test_kill_9_of_the_launcher_takes_its_ranks_with_it(config: Config) -> None:
    process = start_launcher(config)
    process.kill()
    process.communicate(timeout=HANG_S)
    assert_gone(rank_pids(config, 2))
    run(config, plan_of(config, "finish", 1, "again"), launch_id="again")


def test_two_launchers_do_not_work_in_one_run_folder(config: Config) -> None:
    process = start_launcher(config)
    try:
        with pytest.raises(WorldError, match="Another command works"):
            RunFolder(config.run_dir, "other")
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=HANG_S)


@pytest.mark.slow
def test_sixteen_ranks_on_a_small_machine_meet_and_finish(config: Config) -> None:
    run(config, plan_of(config, "meet", 16))
    met = [event for event in read_events(events_path(config.run_dir, 0)) if event["event"] == "met"]
    assert met[0]["ranks"] == list(range(16))


def test_a_wrapper_given_as_the_ranks_python_runs_every_rank(config: Config, tmp_path: Path) -> None:
    wrapper = tmp_path / "python-in-a-box"
    wrapper.write_text(f'#!/bin/sh\nDS_BOX=inside exec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    program = RankProgram("tests.support.rank_program", config.run_dir / "config.yaml", "L", ("environment", "DS_BOX"))
    run(config, single_plan(program, find_tools(LaunchConfig(python=str(wrapper))), {}))
    found = [event for event in read_events(events_path(config.run_dir, 0)) if event["event"] == "environment"][-1]
    assert found["variables"] == {"DS_BOX": "inside"}
