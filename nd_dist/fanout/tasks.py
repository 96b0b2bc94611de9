"""Work off a list of tasks together with other ranks, until every task has a result.

Every rank has a share of the tasks, which it goes through in order; then it takes what others have left, also the
dead. While there is nothing to take, all waiting ranks together ask the file server a few times a second. The work of
a task is a generator of steps: whoever drives it knows after every step that the rank does not hang.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

from nd_dist.compute.threads import Behind
from nd_dist.errors import Requeue
from nd_dist.fanout.leases import Lease, LeasePool, Look

WAIT_S = 0.2  # between two questions of a waiting rank, times the number of ranks
LOOKS = 10  # after at least so many questions a waiting rank looks at everything again, whatever the answers
BLINK_S = 0.25
REPORT_S = 1.0

Steps = Generator[None, None, None]
"""The steps of a piece of work, each a sign that it goes on; closed between two of them, it keeps what is finished."""

Work = Generator[None, None, Steps | None]
"""The same, which may return a rest that another thread does beside the next task (disk, metrics)."""


@dataclass(frozen=True)
class Task:
    """One task of a phase.

    Args:
        name: Its name.
        is_done: Whether its result exists.
        work: How to make it.
        weight: Its share of the work.
        after: Tasks of the same phase that must be done before.
    """

    name: str
    is_done: Callable[[], bool]
    work: Callable[[], Work]
    weight: float = 1.0
    after: tuple[str, ...] = ()


@dataclass
class Tally:
    """What one rank did in one phase."""

    done: int = 0
    taken_over: int = 0
    busy_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what was done in another phase of that name."""
        self.done += other.done
        self.taken_over += other.taken_over
        self.busy_s += other.busy_s


Report = Callable[[int, int, float | None], None]


def _never() -> bool:
    """Return False: nobody asked to stop."""
    return False


def _say_nothing() -> None:
    """Keep quiet after a step."""


@dataclass(frozen=True)
class Watch:
    """What a phase asks and tells while it runs.

    Args:
        should_stop: Asked before every task and after every step; the rank then leaves, and its results stay.
        goes_on: Called after every step.
        report: Told (done, total, seconds left or None) over all ranks now and then; None spares the counting.
        took_over: Told when a task of a dead or frozen rank is taken over.
        began: Told the name of every task that is claimed: what a rank was doing when it died.
    """

    should_stop: Callable[[], bool] = _never
    goes_on: Callable[[], None] = _say_nothing
    report: Report | None = None
    took_over: Callable[[Lease], None] | None = None
    began: Callable[[str], None] | None = None


def work_off(tasks: Sequence[Task], pool: LeasePool, rank: int = 0, size: int = 1, watch: Watch = Watch()) -> Tally:
    """Work until every task has a result, whoever made it.

    Args:
        tasks: All tasks of the phase, the same list on every rank.
        pool: This rank's claims.
        rank, size: This rank's share is every ``size``-th task, from position ``rank``.
        watch: Callbacks.

    Raises:
        Requeue: ``watch.should_stop`` said so.
        RankFailure: a task keeps killing ranks.
    """
    tally, progress = Tally(), _Progress(tasks, watch)
    waiting = _Waiting(pool, rank, size)
    with Behind() as behind:
        for task in tasks[rank::size]:
            if progress.is_due():
                progress.tell(pool.look())
            if task.is_done():
                pool.finish(task.name)
            elif pool.are_done(task.after) and (lease := pool.claim(task.name)):
                _work_one(task, lease, pool, tally, watch, behind)
        while True:
            changed, look = pool.changed_at(), pool.look()
            left = [task for task in tasks if task.name not in look.done]
            if progress.is_due():
                progress.tell(look)
            if not left:
                break
            _leave_if_asked(watch)
            free = [task for task in left if task.name not in look.held and look.done.issuperset(task.after)]
            held = [task for task in left if task.name in look.held]
            if free:  # of the first ones any, as other ranks choose too
                task = waiting.draw(free[: 2 * size])
                lease = pool.claim(task.name)
            elif behind.wait():
                continue
            else:  # nothing is free, so something that others wait for is held
                task = waiting.draw(held)
                lease = pool.take_over(task.name, look.held[task.name])
            if lease is not None:
                _work_one(task, lease, pool, tally, watch, behind)
            elif not free:
                waiting.until_it_changes(changed, watch)
    progress.finish()
    return tally


class _Waiting:
    """How a rank waits for others: it asks when something changed, at odd times, and the less often the more ranks."""

    def __init__(self, pool: LeasePool, rank: int, size: int) -> None:
        self._pool, self._pause_s = pool, WAIT_S * size
        self._most = max(LOOKS, math.ceil(pool.stale_s / self._pause_s))
        self._before = 0
        self._random = random.Random(rank)

    def draw(self, tasks: Sequence[Task]) -> Task:
        """Return one of some tasks."""
        return self._random.choice(tasks)

    def until_it_changes(self, before: int, watch: Watch) -> None:
        """Wait until a claim is made or a task done, or for as long as a heartbeat may stand still.

        After a change it waits once only: what happened in the same tick of the server's clock would not be seen.
        """
        waits, self._before = 1 if before != self._before else self._most, before
        for _ in range(waits):
            end = time.monotonic() + self._pause_s * self._random.uniform(0.75, 1.25)
            while (left_s := end - time.monotonic()) > 0:
                time.sleep(min(BLINK_S, left_s))
                _leave_if_asked(watch)
            if self._pool.changed_at() != before:
                return


class _Progress:
    """Counts what is done over all ranks, seldom enough that counting costs a tenth of the time at most."""

    def __init__(self, tasks: Sequence[Task], watch: Watch) -> None:
        self._tasks, self._report = tasks, watch.report
        self._next = 0.0
        self._began = time.monotonic()
        self._first: float | None = None  # weight that was unfinished when the phase began

    def is_due(self) -> bool:
        """Return whether it is time to count again."""
        return self._report is not None and time.monotonic() >= self._next

    def tell(self, look: Look) -> None:
        """Report how many tasks are done, and the time left at the pace of all ranks so far."""
        if self._report is None:
            return
        now = time.monotonic()
        unfinished = [task for task in self._tasks if task.name not in look.done]
        left = sum(task.weight for task in unfinished)
        self._first = left if self._first is None else self._first
        made = self._first - left
        left_s = (now - self._began) * left / made if made > 0 else None
        self._report(len(self._tasks) - len(unfinished), len(self._tasks), left_s)
        self._next = time.monotonic() + max(REPORT_S, 10 * (time.monotonic() - now))

    def finish(self) -> None:
        """Report that all is done."""
        if self._report is not None:
            self._report(len(self._tasks), len(self._tasks), 0.0)


def _work_one(task: Task, lease: Lease, pool: LeasePool, tally: Tally, watch: Watch, behind: Behind) -> None:
    """Do one claimed task; its result may be there already, from an earlier launch."""
    if task.is_done():
        pool.finish(task.name)
        return
    _leave_if_asked(watch)
    start = time.monotonic()
    if watch.began is not None:
        watch.began(task.name)
    if lease.taken_from:
        tally.taken_over += 1
        if watch.took_over is not None:
            watch.took_over(lease)
    with ExitStack() as held:
        held.enter_context(pool.renewing(lease))
        rest = _do(task.work(), pool, watch)
        if rest is None:
            pool.finish(task.name)
        else:
            behind.do(partial(_finish, task, rest, held.pop_all(), pool, watch))
    tally.done += 1
    tally.busy_s += time.monotonic() - start


def _finish(task: Task, rest: Steps, held: ExitStack, pool: LeasePool, watch: Watch) -> None:
    """Do the rest of a task."""
    with held:
        _do(rest, pool, watch)
        pool.finish(task.name)


def _do(work: Work, pool: LeasePool, watch: Watch) -> Steps | None:
    """Make the steps of a piece of work; return its rest."""
    with closing(work) as steps:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                rest: Steps | None = end.value
                return rest
            pool.note_progress()
            watch.goes_on()
            _leave_if_asked(watch)


def _leave_if_asked(watch: Watch) -> None:
    """Raise Requeue where the rank was asked to stop."""
    if watch.should_stop():
        raise Requeue("The evaluation was asked to stop; what is finished is kept.", todo="start it again")
