"""Faults in the middle of an evaluation over two hosts: the survivors finish, or it ends and the next one does."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, parent_of
from tests.cluster.jobs import Job, end_of, metrics_points, run_nd, words_of

pytestmark = pytest.mark.slow
LONG = {"evaluation__num_repeats": 6, "sampler__num_steps": 12}


@pytest.fixture(scope="module")
def expected(hosts: Cluster, trained: Path) -> object:
    """The numbers of an evaluation that nothing disturbed, made by one rank on one host."""
    other = hosts.folder / "undisturbed"
    shutil.copytree(trained / "run" / "checkpoints", other / "run" / "checkpoints")
    words = words_of(other, shards_dir=trained / "shards", **LONG)
    run_nd(hosts, "node3", "evaluate", "demo", *words, "--ranks", "1")
    return metrics_points(other / "run")


@pytest.fixture
def words(healthy: Cluster, trained: Path, broken: Path) -> list[str]:
    """The words of an evaluation over two hosts that lasts long enough to be broken."""
    shutil.copytree(trained / "run" / "checkpoints", broken / "run" / "checkpoints")
    return ["evaluate", "demo", *words_of(broken, **LONG), "--hostfile", str(broken / "hosts")]


def start(cluster: Cluster, words: list[str], run_dir: Path) -> Job:
    """Start an evaluation and wait until the second host works on a reconstruction."""
    job = Job(cluster, "node1", words, run_dir)
    job.wait_for(1, "unit_began", phase="reconstruct")
    return job


def freeze(job: Job) -> None:
    """Stop a rank and its guard: nobody on its host can tell."""
    rank = job.pid_of(1)
    for pid in (parent_of(rank), rank):
        os.kill(pid, signal.SIGSTOP)


def kill(job: Job) -> None:
    os.kill(job.pid_of(1), signal.SIGKILL)


def stop(job: Job) -> None:
    os.kill(job.pid_of(1), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "do"),
    [("kill -9 of a rank", kill), ("SIGSTOP of a rank", stop), ("SIGSTOP of a rank and its guard", freeze)],
)
def test_an_evaluation_goes_on_without_a_lost_rank_and_its_numbers_are_the_same(
    fault: str, do: Callable[[Job], None], healthy: Cluster, words: list[str], broken: Path, expected: object
) -> None:
    job = start(healthy, words, broken / "run")
    do(job)
    code, text = end_of(job, f"{fault}, nd evaluate", time.monotonic())
    assert code == 0, text
    assert "ranks [1] were lost on the way" in text
    assert [event["dead"]["rank"] for event in job.events(0) if event["event"] == "unit_taken_over"] == [1]
    assert metrics_points(broken / "run") == expected


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_an_evaluation_that_loses_a_host_ends_or_goes_on_and_the_same_command_completes_it(
    fault: str, healthy: Cluster, words: list[str], broken: Path, expected: object
) -> None:
    job = start(healthy, words, broken / "run")
    if fault == "killed":
        healthy.crash("node2")
    else:
        healthy.cut("node2")
    code, text = end_of(job, f"host {fault}, nd evaluate", time.monotonic())
    assert code in (0, 4), text
    assert code == 0 or "node2" in text, text  # a rank that only lost the network may end its work before it is ended
    healthy.repair()
    run_nd(healthy, "node1", *words)
    assert metrics_points(broken / "run") == expected
