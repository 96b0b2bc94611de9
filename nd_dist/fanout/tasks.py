"""Work off a list of tasks together with other ranks: claim, do, look again, until every task has a result.

Who does what follows from ``leases`` alone; a rank that finishes early takes what is left, also from the dead. The
work of a task is a generator of steps: whoever drives it knows after every step that the rank does not hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

from nd_dist.compute.threads import Behind
from nd_dist.errors import Requeue
from nd_dist.fanout.leases import Lease, LeasePool

POLL_S = 0.25
REPORT_S = 1.0

Steps = Generator[None, None, None]
"""The steps of a piece of work, each a sign that it goes on; closed between two of them, it keeps what is finished."""

Work = Generator[None, None, Steps | None]
"""The same, which may return a rest that another thread does beside the next task (disk, metrics)."""


@dataclass(frozen=True)
class Task:
    """One task of a phase: its name, whether its result exists, how to make it, and its share of the work."""

    name: str
    is_done: Callable[[], bool]
    work: Callable[[], Work]
    weight: float = 1.0


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


def work_off(tasks: Sequence[Task], pool: LeasePool, first: int = 0, watch: Watch = Watch()) -> Tally:
    """Work until every task has a result, whoever made it.

    Args:
        tasks: All tasks of the phase, the same list on every rank.
        pool: This rank's claims.
        first: Position to start from; ranks that start apart meet less often.
        watch: Callbacks.

    Raises:
        Requeue: ``watch.should_stop`` said so.
        RankFailure: a task keeps killing ranks.
    """
    tally = Tally()
    progress = _Progress(tasks, watch)
    turn = first % max(1, len(tasks))
    left = [*tasks[turn:], *tasks[:turn]]
    with Behind() as behind:
        while left:
            held_by_others: list[Task] = []
            for position, task in enumerate(left):
                if progress.is_due():
                    progress.tell([*held_by_others, *left[position:]])
                if task.is_done():
                    continue
                _leave_if_asked(watch)
                lease = pool.claim(task.name)
                if lease is None:
                    held_by_others.append(task)
                else:
                    _work_one(task, lease, pool, tally, watch, behind)
            if len(held_by_others) == len(left):
                time.sleep(POLL_S)
            left = held_by_others
    progress.finish()
    return tally


class _Progress:
    """Counts what is done over all ranks, seldom enough that counting costs a tenth of the time at most."""

    def __init__(self, tasks: Sequence[Task], watch: Watch) -> None:
        self._total, self._report = len(tasks), watch.report
        self._next = 0.0
        self._began = time.monotonic()
        self._first: float | None = None  # weight that was unfinished when the phase began

    def is_due(self) -> bool:
        """Return whether it is time to count again."""
        return self._report is not None and time.monotonic() >= self._next

    def tell(self, maybe_unfinished: Sequence[Task]) -> None:
        """Report how many tasks are done, and the time left at the pace of all ranks so far.

        Args:
            maybe_unfinished: The tasks that are not known to be done.
        """
        if self._report is None:
            return
        now = time.monotonic()
        unfinished = [task for task in maybe_unfinished if not task.is_done()]
        left = sum(task.weight for task in unfinished)
        self._first = left if self._first is None else self._first
        made = self._first - left
        left_s = (now - self._began) * left / made if made > 0 else None
        self._report(self._total - len(unfinished), self._total, left_s)
        self._next = time.monotonic() + max(REPORT_S, 10 * (time.monotonic() - now))

    def finish(self) -> None:
        """Report that all is done."""
        if self._report is not None:
            self._report(self._total, self._total, 0.0)


def _work_one(task: Task, lease: Lease, pool: LeasePool, tally: Tally, watch: Watch, behind: Behind) -> None:
    """Do one claimed task; its result may have appeared between the look and the claim."""
    if task.is_done():
        return
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
        if rest is not None:
            behind.do(partial(_finish, rest, held.pop_all(), pool, watch))
    tally.done += 1
    tally.busy_s += time.monotonic() - start


def _finish(rest: Steps, held: ExitStack, pool: LeasePool, watch: Watch) -> None:
    """Do the rest of a task, then let go of it."""
    with held:
        _do(rest, pool, watch)


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
