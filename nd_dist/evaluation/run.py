"""One rank of an evaluation: claim, reconstruct, judge, score, until everything has a result, whoever made it.

    decode -> statistics -> originals -> reconstruct, judge, score -> metrics.json

Each arrow is a wait for *results on disk*, never for a rank: when a rank dies its claims go stale, the others finish
them, and no collective call is left to hang in. MPI is used once, at the start, to agree on the job.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nd_dist.comm import Comm
from nd_dist.compute.device import platform_facts
from nd_dist.errors import NdDistError, Requeue
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.decoding import decode_tasks, statistics_tasks
from nd_dist.evaluation.generalisation import trained_tasks
from nd_dist.evaluation.given import given_tasks
from nd_dist.evaluation.job import SELECTION, Job, Keys, keys_of
from nd_dist.evaluation.points.units import Bundle, Point, distinct_points
from nd_dist.evaluation.reconstruction.costs import (
    DiskUse,
    StepCost,
    StepCount,
    cost_class,
    estimate,
    fit_cost,
    unit_steps,
)
from nd_dist.evaluation.result import metrics_task, scored_entries, settle_metrics
from nd_dist.evaluation.stages import (
    calibration_tasks,
    measurements,
    nearest_tasks,
    original_tasks,
    point_tasks,
)
from nd_dist.evaluation.sweep import Choice, select
from nd_dist.events import EventLog
from nd_dist.fanout.leases import Lease, LeasePool
from nd_dist.fanout.results import SETTINGS, claim_folder, remove_leftovers
from nd_dist.fanout.tasks import Tally, Task, Watch, work_off
from nd_dist.files import read_json, write_json

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
    launch, keys = _agree([job], comm, events)
    run = Worker(comm, events, launch, should_stop)
    metrics = run.evaluate(job, keys[0])
    run.sign_off(job)
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
    jobs = [*_rounds(search), report] if rule.select else [report]
    launch, keys = _agree(jobs, comm, events)
    run = Worker(comm, events, launch, should_stop)
    run.estimate(list(zip(jobs, keys, strict=True))[-2:])
    if only_estimate:
        run.sign_off(report)
        return {}
    if rule.select:
        search = run.halved(jobs[:-1], keys)
        choice = select(run.evaluate(search, keys[-2]), rule.select, rule.rule)
        report = _with_choice(report, search, choice)
        events.write("point_chosen", **choice.chosen.describe(), metric=choice.metric)
    metrics = run.evaluate(report, keys[-1])
    run.sign_off(report)
    return metrics


def _rounds(search: Job) -> list[Job]:
    """Return the rounds of a search: all points on a quarter of the images, then on half, then on all."""
    num_images = search.config.sweep.num_images
    earlier = [num_images // 4, num_images // 2] if search.config.sweep.halving else []
    return [*(dataclasses.replace(search, round_images=count) for count in earlier if count > 1), search]


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


def _agree(jobs: Sequence[Job], comm: Comm, events: EventLog) -> tuple[str, list[Keys]]:
    """Return the launch's id and each job's keys as rank 0 made them; its error is raised on every rank."""
    agreed: tuple[str, list[Keys]] | NdDistError = "", []
    if comm.rank == 0:
        try:
            keys = [keys_of(job) for job in jobs]
            for job, own in zip(jobs, keys, strict=True):
                _clear_up(job)
                _claim_folders(job, own, events)
                for message in () if job.round_images else (settle_metrics(job, own), *_notices(job, own)):
                    if message:
                        events.write("notice", message=message)
            agreed = uuid.uuid4().hex[:12], keys
        except NdDistError as error:
            agreed = error
    answer: tuple[str, list[Keys]] | NdDistError = comm.broadcast(agreed)
    if isinstance(answer, NdDistError):
        raise answer
    return answer


def _clear_up(job: Job) -> None:
    """Remove the claims of earlier launches, and what ranks left half-written that were killed."""
    looks = [LeasePool(folder).look() for folder in job.layout.leases.glob("*/*")]
    if any(look.held.keys() - look.done for look in looks):
        for folder in (job.layout.reconstructions, job.layout.work):
            remove_leftovers(folder)
    shutil.rmtree(job.layout.leases, ignore_errors=True)


def _notices(job: Job, keys: Keys) -> Iterator[str]:
    """Yield what of the protocol will be missing, by reason, and what guidance will not change."""
    reasons: dict[str, list[str]] = {}
    # made-up worlds have judges of their own
    for name, reason in ({} if job.is_simulated or job.split == "train" else keys.absent).items():
        reasons.setdefault(reason, []).append(name)
    if reasons:
        yield "; ".join(f"not computed: {', '.join(names)} ({reason})" for reason, names in reasons.items())
    guided = [point for point in job.points if point.is_guided]
    if without := [point.name for point in guided if not unit_steps(job.config_at(point), [point]).guided]:
        yield f"no step is guided at {', '.join(without)}: eta is too small"


def _claim_folders(job: Job, keys: Keys, events: EventLog) -> None:
    """Make room for this job's results: those of other settings move aside."""
    layout, judging = job.layout, dict(keys.judging)
    wanted = [
        (layout.originals, keys.key("originals"), {"shards": keys.own["shards"]}),
        (layout.judged_originals, keys.key("judged_originals"), judging),
    ]
    for point, subject in itertools.product(distinct_points(job.points), job.subjects):
        pictures, judged, score = (keys.key(stage, point, subject) for stage in ("pictures", "judged", "score"))
        wanted.append((layout.pictures(point, subject), pictures, keys.settings(point, subject)))
        wanted.append((layout.judged(point, subject), judged, judging))
        wanted.append((layout.score(point, subject), score, dict(keys.statistics)))
    for point, subject in itertools.product(job.decodings(), job.subjects):
        retrieval = keys.key("retrieval", point, subject)
        wanted.append((layout.retrieval(point, subject), retrieval, dict(keys.statistics)))
    now, before = platform_facts(job.networks.device), Counter[str]()
    for folder, key, settings in wanted:
        done = claim_folder(folder, key, settings, now)
        if done in ("moved", "restored"):
            events.write("results_of_other_settings", folder=str(folder.relative_to(layout.run_dir)), done=done)
        elif done == "kept" and folder != layout.originals and folder.is_relative_to(layout.reconstructions):
            made_with = read_json(folder / SETTINGS).get("made_with") or now
            before[", ".join(made_with.values())] += made_with != now
    for words, count in before.items():
        if count:
            message = (
                f"pictures of {count} point(s) were begun with {words}; what is made now may differ in last digits"
            )
            events.write("notice", message=message)


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

    def evaluate(self, job: Job, keys: Keys) -> dict[str, Any]:
        """Go through all phases of a job and return the content of its metrics.json."""
        bench = Bench(job, keys)
        self._prepare(bench)
        bench.costs = self.costs
        self._phase(bench, "trained", trained_tasks(bench))
        self._phase(bench, "reconstruct", point_tasks(bench))
        self._phase(bench, "metrics", [metrics_task(bench)])
        metrics: dict[str, Any] = read_json(job.layout.metrics)
        return metrics

    def halved(self, rounds: Sequence[Job], keys: Sequence[Keys]) -> Job:
        """Return the last round of a search with the points that are left after those before it."""
        points = rounds[-1].points
        for job, own in zip(rounds[:-1], keys, strict=False):
            bench = Bench(dataclasses.replace(job, points=points), own, self.costs)
            self._prepare(bench)
            self._phase(bench, "reconstruct", point_tasks(bench), f"{job.round_images} images")
            ranked = select({"split": job.split, "points": scored_entries(bench)}, job.config.sweep.select).ranked
            kept = {item.point for item in ranked[: -(-len(ranked) // 2)]}
            points = tuple(point for point in points if point.without_seed in kept)
            self.events.write("points_stopped", images=job.round_images, left=len(points))
        return dataclasses.replace(rounds[-1], points=points)

    def estimate(self, jobs: Sequence[tuple[Job, Keys]]) -> None:
        """Measure a few units of the first job, and say what everything that is left costs."""
        benches = [Bench(job, keys) for job, keys in jobs]
        first = benches[0]
        self._prepare(first)
        self._phase(first, "calibrate", calibration_tasks(first))
        measured = measurements(first)
        self.costs = {
            name: fit_cost([(StepCount(int(each["guided"]), int(each["plain"])), each["seconds"]) for each in found])
            for name, found in measured.items()
        }
        if self.comm.rank:
            return
        unfinished = [item for bench in benches for item in _unfinished(bench)]
        if not unfinished or any(cost_class(bundle.points[0]) not in self.costs for bundle, _, _ in unfinished):
            return  # nothing is left to do, or all that was to be timed had been made before
        found = estimate(unfinished, self.costs, self.comm.size)
        self.events.write("estimate", **dataclasses.asdict(found), wall_hours=found.wall_hours)
        self.events.write("notice", message=found.describe())
        sizes = next((each for found in measured.values() for each in found if "picture_bytes" in each), None)
        if sizes is not None:
            disk = _disk_use(benches[-1].job, sizes["picture_bytes"], sizes["feature_bytes"])
            groups = len(distinct_points(benches[-1].job.points)) * len(benches[-1].job.subjects)
            self.events.write("notice", message=disk.describe(groups))

    def _prepare(self, bench: Bench) -> None:
        """Decode, and store the pictures that were seen: what reconstructions need first."""
        self._phase(bench, "decode", decode_tasks(bench))
        self._phase(bench, "statistics", statistics_tasks(bench))
        self._phase(bench, "nearest", nearest_tasks(bench))
        self._phase(bench, "given", given_tasks(bench))
        self._phase(bench, "originals", original_tasks(bench))

    def _phase(self, bench: Bench, name: str, tasks: list[Task], part: str = "") -> None:
        """Work off the tasks of a phase, or of a part of one, with the other ranks."""
        job = bench.job
        label = f"{SELECTION}: {name}" if job.split == "train" else name
        label, name = (f"{label}, {part}", f"{name}-{part}") if part else (label, name)
        limit_s = job.config.launch.silence_s
        pool = LeasePool(job.layout.leases / self.launch / name, self.comm.rank, job.stale_s, limit_s)
        report = partial(self._progress, label) if self.comm.rank == 0 and name != "metrics" and tasks else None
        began = partial(self._began, label)
        goes_on = partial(self._goes_on, min(SAY_S, limit_s / 4))
        watch = Watch(self.should_stop, goes_on, report, partial(self._took_over, label), began)
        try:
            tally = work_off(tasks, pool, self.comm.rank, self.comm.size, watch)
        except Requeue:
            self.events.write("evaluation_stopped", phase=label)
            raise
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
        self.events.write("unit_taken_over", phase=phase, unit=lease.task, dead=dict(lease.taken_from))

    def sign_off(self, job: Job) -> None:
        """Say what this rank did."""
        work = {
            name: {"done": tally.done, "taken_over": tally.taken_over, "busy_s": round(tally.busy_s, 3)}
            for name, tally in self.tallies.items()
        }
        facts = {"launch": self.launch, "rank": self.comm.rank, "host": socket.gethostname(), "pid": os.getpid()}
        facts["device"] = platform_facts(job.networks.device)["device"]
        write_json(job.layout.ranks / self.launch / f"rank-{self.comm.rank:04d}.json", {**facts, "work": work})
        self.events.write("evaluation_done", work=work)


def _disk_use(job: Job, picture_bytes: float, feature_bytes: float) -> DiskUse:
    """Return what a job takes on disk; features are there of two families of points at a time, or of all."""
    evaluation, bundles = job.config.evaluation, job.bundles()
    groups = [len(job.images(subject)) for subject in job.subjects for _ in distinct_points(job.points)]
    kept = [min(count, count if evaluation.keep_pictures is None else evaluation.keep_pictures) for count in groups]
    widest = max(len(bundle.points) for bundle in bundles)
    at_a_time = sum(groups) if evaluation.keep_features else min(sum(groups), 2 * widest * max(groups))
    return DiskUse(sum(groups), sum(kept), at_a_time, evaluation.num_repeats, picture_bytes, feature_bytes)


def _unfinished(bench: Bench) -> list[tuple[Bundle, int, StepCount]]:
    """Return the bundles that are not done, with their number of images and the work of one."""
    return [
        (bundle, len(bundle.image_ids), unit_steps(bench.job.config_at(bundle.points[0]), bundle.points))
        for bundle in bench.job.bundles()
        if bench.missing(bundle)
    ]
