"""One rank of an evaluation: claim, reconstruct, judge, score, until everything has a result, whoever made it.

    decode -> originals -> reconstruct and judge -> score -> metrics.json

Each arrow is a wait for *results on disk*, never for a rank: when a rank dies its claims go stale, the others finish
them, and no collective call is left to hang in. MPI is used once, at the start, to agree on the job.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nd_dist.comm import Comm
from nd_dist.errors import NdDistError, Requeue
from nd_dist.evaluation.job import Fingerprints, Job, fingerprints
from nd_dist.evaluation.leases import Lease, LeasePool, Tally, Task, Watch, work_off
from nd_dist.evaluation.records import claim_folder, remove_leftovers
from nd_dist.evaluation.result import metrics_task
from nd_dist.evaluation.stages import Bench, decode_tasks, group_tasks, original_tasks, score_tasks
from nd_dist.evaluation.units import distinct_points
from nd_dist.events import EventLog
from nd_dist.files import read_json, write_json

ROLL_CALL_S = 10.0


def _never() -> bool:
    return False


def evaluate(job: Job, comm: Comm, events: EventLog, should_stop: Callable[[], bool] = _never) -> dict[str, Any]:
    """Evaluate a job together with all other ranks; every rank calls this and gets the content of metrics.json.

    Ranks may die on the way: the others go on. Call no collective afterwards, a dead rank would not answer.

    Args:
        job: What to evaluate.
        comm: The ranks; used once, at the start.
        events: This rank's event file.
        should_stop: Asked between images; the rank then leaves with ``Requeue``, and what is finished stays.

    Raises:
        Requeue: ``should_stop`` said so.
        RankFailure: a unit of work keeps killing ranks.
        NdDistError: whatever else is wrong with folders, networks or settings.
    """
    agreed = _agree(job, comm, events)
    pool = LeasePool(job.layout.leases, agreed.launch, comm.rank, job.stale_s)
    bench = Bench(job, agreed.prints, should_stop)
    run = _Run(job, comm, events, pool, should_stop)
    run.phase("decode", decode_tasks(bench))
    run.phase("originals", original_tasks(bench))
    run.phase("reconstruct", group_tasks(bench))
    run.phase("score", score_tasks(bench))
    run.phase("metrics", [metrics_task(bench)])
    pool.close()
    run.roll_call(agreed.launch)
    metrics: dict[str, Any] = read_json(job.layout.metrics)
    return metrics


@dataclass(frozen=True)
class _Agreed:
    """What rank 0 found out and told everyone."""

    launch: str
    prints: Fingerprints


def _agree(job: Job, comm: Comm, events: EventLog) -> _Agreed:
    """Return rank 0's view of the job; where rank 0 cannot make it, its error is raised on every rank."""
    agreed: _Agreed | NdDistError | None = None
    if comm.rank == 0:
        try:
            prints = fingerprints(job)
            _claim_folders(job, prints, events)
            agreed = _Agreed(uuid.uuid4().hex[:12], prints)
        except NdDistError as error:
            agreed = error
    answer = comm.broadcast(agreed)
    if isinstance(answer, NdDistError):
        raise answer
    assert isinstance(answer, _Agreed)
    return answer


def _claim_folders(job: Job, prints: Fingerprints, events: EventLog) -> None:
    """Make room for this job's results: those of other settings move aside."""
    layout = job.layout
    wanted = [
        (layout.originals, prints.originals, {"shards": prints.settings["shards"]}),
        (layout.judged_originals, prints.judged_originals, dict(prints.judging)),
    ]
    for point in distinct_points(job.points):
        for subject in job.subjects:
            settings = prints.point_settings(point, subject)
            wanted.append((layout.pictures(point, subject), prints.pictures(point, subject), settings))
            wanted.append((layout.judged(point, subject), prints.judged(point, subject), dict(prints.judging)))
    for folder, fingerprint, settings in wanted:
        done = claim_folder(folder, fingerprint, settings)
        if done in ("moved", "restored"):
            events.write("results_of_other_settings", folder=str(folder.relative_to(layout.run_dir)), done=done)


@dataclass
class _Run:
    """This rank's way through the phases."""

    job: Job
    comm: Comm
    events: EventLog
    pool: LeasePool
    should_stop: Callable[[], bool]
    tallies: dict[str, Tally] = field(default_factory=dict)

    def phase(self, name: str, tasks: list[Task]) -> None:
        """Work off the tasks of a phase with the other ranks."""
        is_main = self.comm.rank == 0
        report = partial(self.events.progress, name) if is_main and name != "metrics" else None
        watch = Watch(self.should_stop, report, partial(self._took_over, name))
        try:
            self.tallies[name] = work_off(tasks, self.pool, self.comm.rank * len(tasks) // self.comm.size, watch)
        except Requeue:
            self.events.write("evaluation_stopped", phase=name)
            raise

    def _took_over(self, phase: str, lease: Lease) -> None:
        owner = {key: lease.taken_from.get(key) for key in ("rank", "host", "pid", "launch")}
        self.events.write("unit_taken_over", phase=phase, unit=lease.task, dead=owner)

    def roll_call(self, launch: str) -> None:
        """Say what this rank did; rank 0 waits a moment for the others and names those that are missing."""
        work = {
            name: {"done": tally.done, "taken_over": tally.taken_over, "busy_s": round(tally.busy_s, 3)}
            for name, tally in self.tallies.items()
        }
        identity = {"launch": launch, "rank": self.comm.rank, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self._rank_file(launch, self.comm.rank), {**identity, "work": work})
        self.events.write("evaluation_done", work=work)
        if self.comm.rank:
            return
        missing = self._missing(launch)
        deadline = time.monotonic() + min(ROLL_CALL_S, self.job.stale_s)
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = self._missing(launch)
        if missing:
            self.events.write("ranks_missing", ranks=missing, size=self.comm.size)
        else:
            remove_leftovers(self.job.layout.run_dir / "reconstructions")
            remove_leftovers(self.job.layout.work)

    def _rank_file(self, launch: str, rank: int) -> Path:
        """Return where a rank says what it did."""
        return self.job.layout.ranks / launch / f"rank-{rank:04d}.json"

    def _missing(self, launch: str) -> list[int]:
        """Return the ranks that have not said that they are done."""
        return [rank for rank in range(self.comm.size) if not self._rank_file(launch, rank).exists()]
