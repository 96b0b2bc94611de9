"""Claims with real processes: exclusive, renewed, taken over when their owner is killed or frozen."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nd_dist.errors import RankFailure, Requeue
from nd_dist.fanout.leases import Lease, LeasePool
from nd_dist.fanout.tasks import Steps, Task, Watch, Work, work_off
from tests.support.waiting import HANG_S, wait_until

WORKER = """
import sys, time
from pathlib import Path
from nd_dist.fanout.leases import LeasePool
from nd_dist.fanout.tasks import Task, work_off
folder, name, tasks, stale_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
rank, size = map(int, sys.argv[5:])
def task(index):
    result = folder / f"result-{index}"
    def work():
        (folder / f"log-{name}-{index}").touch()
        while not (folder / f"go-{name}").exists(): time.sleep(0.01)
        try:
            with open(result, "x") as stream: stream.write(name)
        except FileExistsError:
            pass
        yield
    return Task(f"task-{index}", result.exists, work)
pool = LeasePool(folder / "leases", rank, stale_s)
print("ready", flush=True)
tally = work_off([task(i) for i in range(tasks)], pool, rank, size)
print(tally.done, tally.taken_over, flush=True)
"""


def start(
    folder: Path, name: str, tasks: int, stale_s: float = 2 * HANG_S, rank: int = 0, size: int = 1
) -> subprocess.Popen[str]:
    """Start a worker; its tasks take until there is a file ``go-NAME``."""
    words = [str(folder), name, str(tasks), str(stale_s), str(rank), str(size)]
    process = subprocess.Popen([sys.executable, "-c", WORKER, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def answer(worker: subprocess.Popen[str]) -> list[str]:
    """Return the words of a worker's last line, which reading its first one may have taken from the pipe."""
    assert worker.stdout is not None
    worker.wait(HANG_S)
    return worker.stdout.read().split()


def results(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("result-*"))]


def test_several_processes_do_every_task_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, name, 20, rank=rank, size=3) for rank, name in enumerate("abc")]
    wait_until(lambda: len(list(tmp_path.glob("log-*"))) == 3)
    for name in "abc":
        (tmp_path / f"go-{name}").touch()
    done = [int(answer(worker)[0]) for worker in workers]
    assert sum(done) == 20
    assert len(results(tmp_path)) == 20
    assert len(list(tmp_path.glob("log-*"))) == 20, "a task was worked on twice"


def test_a_killed_process_costs_its_task_only(tmp_path: Path) -> None:
    victim = start(tmp_path, "victim", 4, stale_s=1, rank=0, size=2)
    wait_until(lambda: list(tmp_path.glob("log-victim-*")))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (tmp_path / "go-survivor").touch()
    survivor = start(tmp_path, "survivor", 4, stale_s=1, rank=1, size=2)
    assert answer(survivor) == ["4", "1"]


def test_a_frozen_process_loses_its_task_and_does_no_harm_when_it_wakes_up(tmp_path: Path) -> None:
    frozen = start(tmp_path, "frozen", 3, stale_s=1)
    wait_until(lambda: list(tmp_path.glob("log-frozen-*")))
    frozen.send_signal(signal.SIGSTOP)
    (tmp_path / "go-other").touch()
    other = start(tmp_path, "other", 3, stale_s=1)
    assert answer(other) == ["3", "1"]
    (tmp_path / "go-frozen").touch()
    frozen.send_signal(signal.SIGCONT)
    frozen.communicate(timeout=HANG_S)
    assert frozen.returncode == 0
    assert results(tmp_path) == ["other"] * 3


def at_once(do: Callable[[LeasePool], Lease | None], pools: list[LeasePool]) -> list[Lease]:
    """Return the leases that several threads get when they ask at the same moment."""
    barrier = threading.Barrier(len(pools))

    def ask(pool: LeasePool) -> Lease | None:
        barrier.wait()
        return do(pool)

    with ThreadPoolExecutor(len(pools)) as threads:
        return [lease for lease in threads.map(ask, pools) if lease is not None]


def test_a_task_is_claimed_by_one_of_many_threads(tmp_path: Path) -> None:
    assert len(at_once(lambda pool: pool.claim("task"), [LeasePool(tmp_path) for _ in range(8)])) == 1


def test_a_claim_without_a_heartbeat_is_taken_over_by_one_of_many_threads(tmp_path: Path) -> None:
    LeasePool(tmp_path, rank=5).claim("task")
    pools = [LeasePool(tmp_path, stale_s=0) for _ in range(8)]
    assert not at_once(lambda pool: pool.take_over("task", 0), pools), "at the first look nobody knows"
    (lease,) = at_once(lambda pool: pool.take_over("task", 0), pools)
    assert lease.path.name == "task.0001"
    assert lease.taken_from["rank"] == 5


def wait_until_renewed(lease: Lease) -> None:
    """Make a claim look as old as can be, and wait until its owner has renewed it."""
    os.utime(lease.path, (1, 1))
    wait_until(lambda: lease.path.stat().st_mtime > 1)


def test_a_claim_is_renewed_while_its_owner_works(tmp_path: Path) -> None:
    pool, other = LeasePool(tmp_path, stale_s=0.4), LeasePool(tmp_path, stale_s=0)
    lease = pool.claim("task")
    assert lease is not None
    with pool.renewing(lease):
        for _ in range(2):
            wait_until_renewed(lease)
            assert other.take_over("task", 0) is None


def test_a_task_in_which_its_owner_hangs_goes_to_another_rank_although_the_owner_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("nd_dist.fanout.leases.time", SimpleNamespace(monotonic=lambda: now))
    pool, other = LeasePool(tmp_path, stale_s=0.4, limit_s=10), LeasePool(tmp_path, stale_s=0)
    lease = pool.claim("task")
    assert lease is not None
    with pool.renewing(lease):
        for _ in range(3):  # it is slow, but goes on
            now += 9
            wait_until_renewed(lease)
            pool.note_progress()
        now += 11
        wait_until(lambda: other.take_over("task", 0))


def test_a_task_that_keeps_killing_ranks_ends_the_run_and_is_named(tmp_path: Path) -> None:
    for generation in range(3):
        (tmp_path / f"task.{generation:04d}").write_text(json.dumps({"host": "elsewhere", "rank": generation}))
    pool = LeasePool(tmp_path, stale_s=0)
    pool.take_over("task", pool.look().held["task"])
    with pytest.raises(RankFailure, match=r"3 ranks died(?s:.*)unit task; last: rank 2 on elsewhere"):
        pool.take_over("task", 2)


def noting_tasks(num: int, done: list[int]) -> list[Task]:
    """Return tasks that only note that they were done."""

    def task(index: int) -> Task:
        def work() -> Steps:
            done.append(index)
            yield

        return Task(f"task-{index}", lambda: index in done, work)

    return [task(index) for index in range(num)]


def test_every_step_of_a_task_is_a_sign_of_life_and_a_moment_to_stop(tmp_path: Path) -> None:
    seen: list[str] = []

    def work() -> Steps:
        try:
            for step in range(5):
                seen.append(f"step {step}")
                yield
        finally:
            seen.append("kept what is finished")

    task = Task("task", lambda: False, work)
    watch = Watch(should_stop=lambda: "step 2" in seen, goes_on=lambda: seen.append("goes on"))
    with pytest.raises(Requeue):
        work_off([task], LeasePool(tmp_path), watch=watch)
    assert seen == ["step 0", "goes on", "step 1", "goes on", "step 2", "goes on", "kept what is finished"]


def test_the_rest_of_a_task_is_done_beside_the_next_one_and_holds_its_task(tmp_path: Path) -> None:
    began_next, results = threading.Event(), []
    pool = LeasePool(tmp_path)

    def rest() -> Steps:
        assert began_next.wait(60), "the next task waited for the rest of this one"
        assert "first" not in pool.look().done, "the task counted as done before its rest was"
        results.append("first")
        yield

    def first() -> Work:
        yield
        return rest()

    def second() -> Steps:
        began_next.set()
        yield
        results.append("second")

    tasks = [
        Task(name, lambda name=name: name in results, work) for name, work in (("first", first), ("second", second))
    ]
    assert work_off(tasks, pool).done == 2
    assert sorted(results) == ["first", "second"]
    assert pool.look().done == {"first", "second"}


def test_an_error_of_a_rest_ends_the_work(tmp_path: Path) -> None:
    def rest() -> Steps:
        yield
        raise ValueError("the disk is full")

    def work() -> Work:
        yield
        return rest()

    with pytest.raises(ValueError, match="disk is full"):
        work_off([Task("task", lambda: False, work)], LeasePool(tmp_path))


def test_a_rank_that_is_asked_to_stop_leaves_and_keeps_its_results(tmp_path: Path) -> None:
    done: list[int] = []
    tasks = noting_tasks(5, done)
    with pytest.raises(Requeue):
        work_off(tasks, LeasePool(tmp_path / "first"), watch=Watch(should_stop=lambda: len(done) == 2))
    assert done == [0, 1]
    assert work_off(tasks, LeasePool(tmp_path / "second")).done == 3


def test_a_rank_does_its_own_share_first_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    done: list[int] = []
    told: list[tuple[int, int, float | None]] = []
    report = Watch(report=lambda *counts: told.append(counts))
    work_off(noting_tasks(4, done), LeasePool(tmp_path), rank=1, size=2, watch=report)
    assert done[:2] == [1, 3]
    assert sorted(done[2:]) == [0, 2]
    assert told[0] == (0, 4, None)
    assert told[-1] == (4, 4, 0.0)


def test_a_task_waits_for_those_before_it(tmp_path: Path) -> None:
    done: list[int] = []
    first, second, third = noting_tasks(3, done)
    work_off([dataclasses.replace(first, after=(second.name, third.name)), second, third], LeasePool(tmp_path))
    assert done[-1] == 0


def test_no_tasks_are_no_work(tmp_path: Path) -> None:
    assert work_off([], LeasePool(tmp_path), rank=3, size=8).done == 0


REQUESTS = {"look": 5, "changed_at": 1, "take_over": 9}  # file system calls, as strace counts them


def test_sixty_four_waiting_ranks_ask_the_file_server_less_than_twenty_times_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, size = LeasePool(tmp_path), 64
    claims = [lease.path for index in range(size) if (lease := holder.claim(f"task-{index}"))]
    now, asked = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 3600:
            raise Requeue("an hour is over")

    def count(requests: int, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any) -> Any:
            nonlocal asked
            asked += requests
            for path in claims:  # their owners live
                os.utime(path, (now, now))
            return method(*words)

        return counted

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr("nd_dist.fanout.tasks.time", clock)
    monkeypatch.setattr("nd_dist.fanout.leases.time", clock)
    for name, requests in REQUESTS.items():
        monkeypatch.setattr(LeasePool, name, count(requests, getattr(LeasePool, name)))
    tasks = [Task(f"task-{index}", lambda: False, lambda: iter(())) for index in range(size)]
    with pytest.raises(Requeue):
        work_off(tasks, LeasePool(tmp_path), rank=7, size=size)
    assert size * asked / now < 20
