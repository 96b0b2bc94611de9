"""Faults in the middle of a training over two hosts: it ends in bounded time, says why, and goes on when run again.

``ND_FAULT_TIMES=FILE pytest tests/cluster/test_failures.py -m ''`` appends the measured seconds of faults to FILE.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from nd_dist.events import events_path, read_events
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import Job, end_of, losses, require_launcher, run_nd, words_of
from tests.support.waiting import wait_until

FAULT_STEP = 16


def long_words(folder: Path, more: dict[str, object]) -> list[str]:
    """Return the words of a training that lasts long enough to be broken."""
    return [*words_of(folder, training__steps="[3000,4]", **more), "--hostfile", str(folder / "hosts")]


def start(cluster: Cluster, folder: Path, *options: str, host: str = "node1", **more: object) -> Job:
    """Start a training and wait until it has saved something and gone on."""
    job = Job(cluster, host, ["train", "demo", *long_words(folder, more), *options], folder / "run")
    job.wait_for(0, "checkpoint_saved", step=8)
    job.wait_for(0, "train_step", step=FAULT_STEP)
    return job


def assert_goes_on(cluster: Cluster, folder: Path, **more: object) -> None:
    """Run the same command again: it resumes, repeats the losses bit for bit, and ctrl-C lets it save and leave."""
    before = losses(list(read_events(events_path(folder / "run", 0))))
    job = Job(cluster, "node1", ["train", "demo", *long_words(folder, more)], folder / "run")
    loaded = job.wait_for(0, "checkpoint_loaded")
    assert loaded["step"] >= 8
    job.wait_for(0, "train_step", step=loaded["step"] + 4)
    job.signal(signal.SIGINT)
    code, text = end_of(job, "ctrl-C", time.monotonic())
    assert code == 5, text
    assert "SIGINT" in text
    resumed = losses(job.events(0))
    assert min(step for _, step in resumed) == loaded["step"]
    same = sorted(resumed.keys() & before.keys())
    assert [resumed[key] for key in same] == [before[key] for key in same]
    last = max(step for _, step in resumed) + 1
    assert [e["step"] for e in job.events(0) if e["event"] == "checkpoint_saved"][-1] == last


def test_kill_9_of_a_rank_is_named_and_the_same_command_goes_on(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    os.kill(job.pid_of(1), signal.SIGKILL)
    code, text = end_of(job, "kill -9 of a rank", time.monotonic())
    assert code == 4, text
    assert "Rank 1 on node2: it was killed by SIGKILL" in text
    assert "rank-0001.log" in text
    status = run_nd(healthy, "node3", "status", str(broken / "run"))
    assert "failed train" in status
    assert "rank 1 on node2: it was killed by SIGKILL" in status
    assert_goes_on(healthy, broken)


def test_a_host_whose_processes_are_all_killed_is_named(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    healthy.crash("node2")
    code, text = end_of(job, "kill -9 of a host's process tree", time.monotonic())
    assert code == 4, text
    assert "Host node2 with rank(s) 1 does not respond" in text


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_ended(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    os.kill(job.pid_of(1), signal.SIGSTOP)
    code, text = end_of(job, "SIGSTOP of a rank", time.monotonic())
    assert code == 4, text
    assert "Rank 1 on node2: it was stopped (SIGSTOP)" in text


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_good_is_named_and_clears_itself(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    healthy.cut("node2")
    code, text = end_of(job, "link cut for good", time.monotonic())
    assert code == 4, text
    assert "Host node2 with rank(s) 1 does not respond" in text
    healthy.heal("node2")
    assert_goes_on(healthy, broken)


@pytest.mark.slow
def test_a_short_group_timeout_ends_a_cut_off_training_sooner_than_the_hosts_are_given_up(
    healthy: Cluster, broken: Path
) -> None:
    job = start(healthy, broken, launch__timeout_s=8)
    healthy.cut("node2")
    code, text = end_of(job, "link cut for good, launch.timeout_s=8", time.monotonic())
    assert code == 4, text
    assert "node2" in text or "node1" in text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed-pdsh", "deepspeed-openmpi"])
def test_a_link_that_is_away_for_20_s_costs_20_s_and_nothing_else(
    launcher: str, healthy: Cluster, broken: Path
) -> None:
    require_launcher(launcher)
    job = start(healthy, broken, "--launcher", launcher)
    began = time.monotonic()
    healthy.cut("node2")
    time.sleep(20)
    at = max(step for _, step in losses(job.events(0)))
    healthy.heal("node2")
    wait_until(lambda: max(step for _, step in losses(job.events(0))) > at + 4, "training goes on")
    job.signal(signal.SIGTERM)
    code, text = end_of(job, f"link cut for 20 s, then SIGTERM, {launcher}", began + 20)
    assert code == 5, text


def test_a_full_disk_on_one_host_is_named_with_its_host(healthy: Cluster, broken: Path) -> None:
    stage = broken / "run" / "checkpoints" / "stage1"
    stage.mkdir(parents=True)
    healthy.run("node2", ["mount", "-t", "tmpfs", "-o", "size=16k", "full", str(stage)])
    words = [*words_of(broken), "--hostfile", str(broken / "hosts")]
    job = Job(healthy, "node1", ["train", "demo", *words], broken / "run")
    try:
        code, text = end_of_start(job)
    finally:
        healthy.run("node2", ["umount", "--lazy", str(stage)])
    assert code == 4, text
    assert "Rank 1 on node2: A checkpoint could not be written" in text


def end_of_start(job: Job) -> tuple[int, str]:
    """Wait for a job that breaks at its first checkpoint."""
    job.wait_for(0, "train_step", step=7)
    return end_of(job, "full disk on one host", time.monotonic())


@pytest.mark.slow
def test_sigterm_at_the_head_lets_the_ranks_save(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    job.signal(signal.SIGTERM)
    code, text = end_of(job, "SIGTERM to nd", time.monotonic())
    assert code == 5, text
    saved = [event["step"] for event in job.events(0) if event["event"] == "checkpoint_saved"]
    assert saved[-1] == max(step for _, step in losses(job.events(0))) + 1


def test_a_launch_is_stopped_from_a_host_that_takes_no_part_in_it(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    answer = run_nd(healthy, "node3", "stop", str(broken / "run"))
    code, text = end_of(job, "nd stop on another host", time.monotonic())
    assert "on node1) to save and stop" in answer
    assert "stopped train" in answer
    assert (code, "Stopped by `nd stop`" in text) == (5, True), text
    saved = [event["step"] for event in job.events(0) if event["event"] == "checkpoint_saved"]
    assert saved[-1] == max(step for _, step in losses(job.events(0))) + 1


@pytest.mark.slow
def test_kill_9_of_nd_leaves_nothing_on_any_host(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken)
    job.signal(signal.SIGKILL)
    end_of(job, "kill -9 of nd", time.monotonic())
    assert_goes_on(healthy, broken)


@pytest.mark.slow
def test_a_head_that_loses_its_power_leaves_nothing_on_the_other_hosts(healthy: Cluster, broken: Path) -> None:
    job = start(healthy, broken, host="node3")
    healthy.cut("node3")
    healthy.crash("node3")
    end_of(job, "power off of the launching host", time.monotonic())


@pytest.mark.slow
def test_open_mpis_launcher_ends_as_well(healthy: Cluster, broken: Path) -> None:
    require_launcher("deepspeed-openmpi")
    job = start(healthy, broken, "--launcher", "deepspeed-openmpi")
    os.kill(job.pid_of(1), signal.SIGKILL)
    code, text = end_of(job, "kill -9 of a rank, deepspeed-openmpi", time.monotonic())
    assert code == 4, text
    assert "Rank 1 on node2: it was killed by SIGKILL" in text


@pytest.mark.slow
def test_a_cut_off_host_is_cleared_under_mpi_too(healthy: Cluster, broken: Path) -> None:
    require_launcher("deepspeed-openmpi")
    job = start(healthy, broken, "--launcher", "deepspeed-openmpi")
    healthy.cut("node2")
    code, text = end_of(job, "link cut for good, deepspeed-openmpi", time.monotonic())
    assert code == 4, text
    assert "node2" in text
