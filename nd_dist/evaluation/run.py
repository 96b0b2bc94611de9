"""One rank of an evaluation: claim, reconstruct, judge, score, until everything has a result, whoever made it.

    decode -> statistics -> originals -> reconstruct and judge -> score -> metrics.json

Each arrow is a wait for *results on disk*, never for a rank: when a rank dies its claims go stale, the others finish
them, and no collective call is left to hang in. MPI is used once, at the start, to agree on the job.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nd_dist.comm import Comm
from nd_dist.compute.device import platform_facts
from nd_dist.errors import NdDistError, Requeue
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.decoding import decode_tasks, statistics_tasks
from nd_dist.evaluation.generalisation import generalisation_tasks, trained_tasks
from nd_dist.evaluation.given import given_tasks
from nd_dist.evaluation.job import SELECTION, Fingerprints, Job, fingerprints
from nd_dist.evaluation.points.units import Bundle, Point, distinct_points
from nd_dist.evaluation.reconstruction.costs import StepCost, StepCount, cost_class, estimate, fit_cost, unit_steps
from nd_dist.evaluation.result import metrics_task, settle_metrics
from nd_dist.evaluation.stages import (
    bundle_tasks,
    calibration_tasks,
    measured_costs,
    nearest_tasks,
    original_tasks,
    score_tasks,
)
from nd_dist.evaluation.sweep import Choice, select
from nd_dist.events import EventLog
from nd_dist.fanout.leases import Lease, LeasePool
from nd_dist.fanout.results import claim_folder, remove_leftovers
from nd_dist.fanout.tasks import Tally, Task, Watch, work_off
from nd_dist.files import read_json, write_json

ROLL_CALL_S = 10.0
SAY_S = 30.0


def _never() -> bool:
    return False


def evaluate(job: Job, comm: Comm, events: EventLog, should_stop: Callable[[], bool] = _never) -> dict[str, Any]:
    """Evaluate a job together with all other ranks; every rank calls this and gets the content of metrics.json.

    Ranks may die on the way: the others go on. Call no collective afterwards, a dead rank would not answer.

    Args:
        job: What to evaluate.
        comm: The ranks; used once, at the start.
        events: This rank's event file.
        should_stop: Asked after every step of work; the rank then leaves with ``Requeue``, and what is finished stays.

    Raises:
        Requeue: ``should_stop`` said so.
        RankFailure: a unit of work keeps killing ranks.
        NdDistError: whatever else is wrong with folders, networks or settings.
    """
    agreed = _agree([job], comm, events)
    run = Worker(comm, events, agreed.launch, should_stop)
    metrics = run.evaluate(job, agreed.prints[0])
    run.roll_call(job)
    return metrics


def sweep(
    search: Job,
    report: Job,
    comm: Comm,
    events: EventLog,
    should_stop: Callable[[], bool] = _never,
    only_estimate: bool = False,
) -> dict[str, Any]:
    """Choose a point on training images, then evaluate on test images; every rank calls this.

    Args:
        search: The grid on training images; not looked at where the recipe chooses nothing.
        report: The grid on test images.
        comm: The ranks; used once, at the start.
        events: This rank's event file.
        should_stop: See ``evaluate``.
        only_estimate: Stop after the cost estimate.

    Returns:
        The content of metrics.json of the test images; empty with ``only_estimate``.
    """
    rule = report.config.sweep
    jobs = [search, report] if rule.select else [report]
    agreed = _agree(jobs, comm, events)
    run = Worker(comm, events, agreed.launch, should_stop)
    run.estimate(list(zip(jobs, agreed.prints, strict=True)))
    if only_estimate:
        run.roll_call(report)
        return {}
    if rule.select:
        choice = select(run.evaluate(search, agreed.prints[0]), rule.select, rule.rule)
        report = _with_choice(report, search, choice)
        events.write("point_chosen", **choice.chosen.describe(), metric=choice.metric)
    metrics = run.evaluate(report, agreed.prints[-1])
    run.roll_call(report)
    return metrics


def _with_choice(report: Job, search: Job, choice: Choice) -> Job:
    """Return the job of the test images with the choice on record, reduced to it where the recipe says so."""
    images = {str(subject): list(search.images(subject)) for subject in search.subjects}
    selection = {**choice.describe(), "images": images, "heldout": bool(search.heldout)}
    if report.config.sweep.report == "grid":
        return dataclasses.replace(report, selection=selection)
    chosen = choice.chosen.point
    kept = tuple(point for point in report.points if point.control != "none" or _is_reported(point, chosen))
    return dataclasses.replace(report, selection=selection, points=kept)


def _is_reported(point: Point, chosen: Point) -> bool:
    """Return whether a point of the grid is the chosen one (with any seed), or that one without guidance."""
    same_guidance = (point.kappa, point.eta) == (chosen.kappa, chosen.eta)
    return point.without_seed.settings == chosen.settings and (same_guidance or not point.is_guided)


@dataclass(frozen=True)
class _Agreed:
    """What rank 0 found out and told everyone."""

    launch: str
    prints: list[Fingerprints]


def _agree(jobs: Sequence[Job], comm: Comm, events: EventLog) -> _Agreed:
    """Return rank 0's view of the jobs; where rank 0 cannot make it, its error is raised on every rank."""
    agreed: _Agreed | NdDistError | None = None
    if comm.rank == 0:
        try:
            prints = [fingerprints(job) for job in jobs]
            for job, own in zip(jobs, prints, strict=True):
                _claim_folders(job, own, events)
                for message in (settle_metrics(job, own), _absent(job, own)):
                    if message:
                        events.write("notice", message=message)
            agreed = _Agreed(uuid.uuid4().hex[:12], prints)
        except NdDistError as error:
            agreed = error
    answer = comm.broadcast(agreed)
    if isinstance(answer, NdDistError):
        raise answer
    assert isinstance(answer, _Agreed)
    return answer


def _absent(job: Job, prints: Fingerprints) -> str:
    """Return which of the protocol's metrics will be missing, by reason; made-up worlds have judges of their own."""
    if job.is_simulated or job.split == "train":
        return ""
    reasons: dict[str, list[str]] = {}
    for name, reason in prints.absent.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"not computed: {', '.join(names)} ({reason})" for reason, names in reasons.items())


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
class Worker:
    """This rank's way through the phases of one or more jobs of a launch.

    Args:
        comm: Rank and size; no collective call is made.
        events: This rank's event file.
        launch: Id that all ranks of the launch share.
        should_stop: Asked after every step of work.
        tallies: Phase -> what this rank did.
        costs: Cost class -> seconds per step, once measured.
    """

    comm: Comm
    events: EventLog
    launch: str
    should_stop: Callable[[], bool]
    tallies: dict[str, Tally] = field(default_factory=dict)
    costs: dict[str, StepCost] = field(default_factory=dict)
    _said_at: float = field(default=0.0, init=False)

    def evaluate(self, job: Job, prints: Fingerprints) -> dict[str, Any]:
        """Go through all phases of a job and return the content of its metrics.json."""
        bench = Bench(job, prints)
        self._prepare(bench)
        bench.costs = self.costs
        self._phase(bench, "reconstruct", bundle_tasks(bench))
        self._phase(bench, "score", score_tasks(bench))
        self._phase(bench, "trained", trained_tasks(bench))
        self._phase(bench, "generalisation", generalisation_tasks(bench))
        self._phase(bench, "metrics", [metrics_task(bench)])
        metrics: dict[str, Any] = read_json(job.layout.metrics)
        return metrics

    def estimate(self, jobs: Sequence[tuple[Job, Fingerprints]]) -> None:
        """Measure a few units of the first job, and say what everything that is left costs."""
        benches = [Bench(job, prints) for job, prints in jobs]
        first = benches[0]
        self._prepare(first)
        self._phase(first, "calibrate", calibration_tasks(first))
        self.costs = {name: fit_cost(measured) for name, measured in measured_costs(first).items()}
        if self.comm.rank:
            return
        unfinished = [item for bench in benches for item in _unfinished(bench)]
        if not unfinished or any(cost_class(bundle.points[0]) not in self.costs for bundle, _, _ in unfinished):
            return  # nothing is left to do, or all that was to be timed had been made before
        found = estimate(unfinished, self.costs, self.comm.size)
        self.events.write("estimate", **dataclasses.asdict(found), wall_hours=found.wall_hours)
        self.events.write("notice", message=found.describe())

    def _prepare(self, bench: Bench) -> None:
        """Decode, and store the pictures that were seen: what reconstructions need first."""
        self._phase(bench, "decode", decode_tasks(bench))
        self._phase(bench, "statistics", statistics_tasks(bench))
        self._phase(bench, "nearest", nearest_tasks(bench))
        self._phase(bench, "given", given_tasks(bench))
        self._phase(bench, "originals", original_tasks(bench))

    def _phase(self, bench: Bench, name: str, tasks: list[Task]) -> None:
        """Work off the tasks of a phase with the other ranks."""
        job = bench.job
        label = f"{SELECTION}: {name}" if job.split == "train" else name
        limit_s = job.config.launch.silence_s
        pool = LeasePool(job.layout.leases, self.launch, self.comm.rank, job.stale_s, limit_s)
        report = partial(self._progress, label) if self.comm.rank == 0 and name != "metrics" and tasks else None
        began = partial(self._began, label)
        goes_on = partial(self._goes_on, min(SAY_S, limit_s / 4))
        watch = Watch(self.should_stop, goes_on, report, partial(self._took_over, label), began)
        try:
            tally = work_off(tasks, pool, self.comm.rank * len(tasks) // self.comm.size, watch)
        except Requeue:
            self.events.write("evaluation_stopped", phase=label)
            raise
        finally:
            pool.close()
        self.tallies.setdefault(label, Tally()).add(tally)

    def _goes_on(self, every_s: float) -> None:
        """Say now and then that the unit goes on, however long it takes."""
        if time.monotonic() - self._said_at > every_s:
            self._said_at = time.monotonic()
            self.events.write("unit_goes_on")

    def _progress(self, label: str, done: int, total: int, left_s: float | None) -> None:
        self.events.progress(label, done, total, **({} if left_s is None else {"left_s": round(left_s, 1)}))

    def _began(self, phase: str, unit: str) -> None:
        self.events.write("unit_began", phase=phase, unit=unit)

    def _took_over(self, phase: str, lease: Lease) -> None:
        owner = {key: lease.taken_from.get(key) for key in ("rank", "host", "pid", "launch")}
        self.events.write("unit_taken_over", phase=phase, unit=lease.task, dead=owner)

    def roll_call(self, job: Job) -> None:
        """Say what this rank did; rank 0 waits a moment for the others and names those that are missing."""
        work = {
            name: {"done": tally.done, "taken_over": tally.taken_over, "busy_s": round(tally.busy_s, 3)}
            for name, tally in self.tallies.items()
        }
        identity = {"launch": self.launch, "rank": self.comm.rank, "host": socket.gethostname(), "pid": os.getpid()}
        identity["device"] = platform_facts(job.networks.device)["device"]
        write_json(self._rank_file(job, self.comm.rank), {**identity, "work": work})
        self.events.write("evaluation_done", work=work)
        if self.comm.rank:
            return
        missing = self._missing(job)
        deadline = time.monotonic() + min(ROLL_CALL_S, job.stale_s)
        while missing and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = self._missing(job)
        if missing:
            self.events.write("ranks_missing", ranks=missing, size=self.comm.size)
        else:
            for folder in ("reconstructions", "evaluation", SELECTION):
                remove_leftovers(job.config.run_dir / folder)

    def _rank_file(self, job: Job, rank: int) -> Path:
        """Return where a rank says what it did."""
        return job.layout.ranks / self.launch / f"rank-{rank:04d}.json"

    def _missing(self, job: Job) -> list[int]:
        """Return the ranks that have not said that they are done."""
        return [rank for rank in range(self.comm.size) if not self._rank_file(job, rank).exists()]


def _unfinished(bench: Bench) -> list[tuple[Bundle, int, StepCount]]:
    """Return the bundles that are not done, with the number of images left and the work of one."""
    found = []
    for bundle in bench.job.bundles():
        left = sum(bool(bench.missing(bundle, image_id)) for image_id in bundle.image_ids)
        if left:
            found.append((bundle, left, unit_steps(bench.job.config_at(bundle.points[0]), bundle.points)))
    return found
