"""The tasks of each phase of an evaluation: for each, whether its result is there, and how to make it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.points.layout import ARRAYS
from nd_dist.evaluation.points.units import Bundle, Point, distinct_points, image_name, subject_name
from nd_dist.evaluation.reconstruction.controls import nearest_images
from nd_dist.evaluation.reconstruction.costs import StepCount, cost_class, unit_steps
from nd_dist.evaluation.reconstruction.decode import StoredTargets, TrueTargets
from nd_dist.evaluation.reconstruction.reconstruct import (
    Reconstruction,
    Result,
    copy_picture,
    reconstruct,
    store_original,
)
from nd_dist.evaluation.scoring.groups import group_metrics
from nd_dist.evaluation.scoring.judging import Judges, Verdict, judge_all
from nd_dist.evaluation.scoring.retrieved import retrieval_metrics
from nd_dist.evaluation.scoring.score import JudgedImages, judge_scores, score_images, scored_sets
from nd_dist.fanout.results import publish, read_record, write_staged
from nd_dist.fanout.tasks import Steps, Task, Work
from nd_dist.metrics.scores import EACH, kept_arrays, scored_arrays
from nd_dist.schema import GUIDANCE, SEMANTIC

CALIBRATION_BATCHES = 2  # the first warms up; the last is timed


def nearest_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject for the control ``nearest``: find each image's nearest training image."""
    points = [point for point in bench.job.points if point.control == "nearest"]
    return [_nearest_task(bench, point, subject) for point in points for subject in bench.job.subjects]


def _nearest_task(bench: Bench, point: Point, subject: int) -> Task:
    job, folder, fingerprint = bench.job, bench.job.layout.nearest(subject), bench.prints.pictures(point, subject)

    def work() -> Steps:
        compared, name = bench.targets(point, subject), compared_target(bench, point, subject)
        ids, candidates = job.images(subject), job.source.images(subject, "train")
        found: dict[int, int] = {}
        for nearest in nearest_images(compared, TrueTargets(job.source), name, ids, candidates):
            found = nearest
            yield
        facts = {"target": name, "nearest": {str(image_id): chosen for image_id, chosen in found.items()}}
        publish(folder, fingerprint, facts, lambda staging: None)

    return Task(f"nearest_{subject_name(subject)}", lambda: bench.has(folder, fingerprint), work)


def original_tasks(bench: Bench) -> list[Task]:
    """Return the tasks that store and judge the pictures that were seen, some images each."""
    ids, size = bench.job.all_images(), max(8, bench.job.config.evaluation.batch_size)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [_original_task(bench, index, chunk) for index, chunk in enumerate(chunks)]


def _original_task(bench: Bench, index: int, image_ids: Sequence[int]) -> Task:
    job, prints = bench.job, bench.prints
    judged = job.layout.judged_originals

    def is_done() -> bool:
        return all(bench.has(judged / image_name(image_id), prints.judged_originals) for image_id in image_ids)

    def verdicts() -> Iterator[Verdict]:
        for image_id in image_ids:
            original, folder = job.layout.original_of(image_id), judged / image_name(image_id)
            if not bench.has(original, prints.originals):
                store_original(original, prints.originals, job.source, image_id)
            if not bench.has(folder, prints.judged_originals):
                yield Verdict(folder, prints.judged_originals, original)

    def work() -> Steps:
        yield from judge_all(verdicts(), job.protocol, Judges(bench.judges.features))

    return Task(f"original_{index:05d}", is_done, work)


def calibration_tasks(bench: Bench) -> list[Task]:
    """Return one task per cost class: make and time a few units, which count as done afterwards."""
    classes: dict[str, dict[str, list[Bundle]]] = {}
    for bundle in bench.job.bundles():
        if bundle.points[0].control == "none":
            kinds = classes.setdefault(cost_class(bundle.points[0]), {})
            kinds.setdefault("guided" if bundle.points[-1].is_guided else "plain", []).append(bundle)
    return [_calibration_task(bench, name, list(kinds.values())) for name, kinds in classes.items()]


def _calibration_task(bench: Bench, name: str, kinds: Sequence[Sequence[Bundle]]) -> Task:
    first = kinds[0][0]
    folder, fingerprint = bench.job.layout.costs / name, bench.prints.judged(first.points[0], first.subject)

    def work() -> Steps:
        measured = []
        for bundles in kinds:
            timed: list[tuple[StepCount, float]] = []
            every_batch = ((bundle, batch) for bundle in bundles for batch in _batches(bench, bundle))
            for bundle, batch in itertools.islice(every_batch, CALIBRATION_BATCHES):
                config, points = bench.job.config_at(bundle.points[0]), batch.points
                bench.sampler(bundle.points[0])  # loading is not what a unit costs
                before = time.monotonic()
                made = _made(bench, bundle, batch)
                yield
                yield from _written_and_judged(bench, replace(bundle, image_ids=tuple(batch.results)), made)
                timed.append((unit_steps(config, points), (time.monotonic() - before) / len(batch.places)))
            measured += [{"guided": w.guided, "plain": w.plain, "seconds": s} for w, s in timed[-1:]]
        publish(folder, fingerprint, {"measured": measured}, lambda staging: None)

    return Task(f"calibrate_{name}", lambda: bench.has(folder, fingerprint), work)


def measured_costs(bench: Bench) -> dict[str, list[tuple[StepCount, float]]]:
    """Return cost class -> what its calibration measured; a class without measurements is left out."""
    found = {}
    for task in calibration_tasks(bench):
        name = task.name.removeprefix("calibrate_")
        entries = read_record(bench.job.layout.costs / name).get("measured", [])
        if entries:
            found[name] = [(StepCount(entry["guided"], entry["plain"]), float(entry["seconds"])) for entry in entries]
    return found


def bundle_tasks(bench: Bench) -> list[Task]:
    """Return one task per bundle: reconstruct its images and judge them."""
    return [_bundle_task(bench, bundle) for bundle in bench.job.bundles()]


def _bundle_task(bench: Bench, bundle: Bundle) -> Task:
    def is_done() -> bool:
        return not any(bench.missing(bundle, image_id) for image_id in bundle.image_ids)

    def work() -> Work:
        made: list[Reconstruction] = []
        for batch in _batches(bench, bundle):
            made += _made(bench, bundle, batch)
            yield
        return _written_and_judged(bench, bundle, made)

    work_of_one = unit_steps(bench.job.config_at(bundle.points[0]), bundle.points)
    weight = bench.cost_of(bundle.points[0]).seconds(work_of_one) * len(bundle.image_ids)
    return Task(bundle.name, is_done, work, weight)


class _Batch(NamedTuple):
    """A forward batch: the image at each place, and the images that are made in it with where their pictures go."""

    places: list[int]
    results: dict[int, list[Result]]

    @property
    def points(self) -> list[Point]:
        """The points at which its images are made."""
        return [result.point for result in next(iter(self.results.values()))]


def _batches(bench: Bench, bundle: Bundle) -> Iterator[_Batch]:
    """Yield what is to be made of a bundle's pictures, a forward batch at a time.

    On a GPU a batch has a place for every image of a bundle, whose own place never changes; where one is made already
    its place is filled with one that is not. On a CPU, where that gains nothing, a batch has a single place.
    """
    groups: dict[tuple[Point, ...], dict[int, list[Result]]] = {}
    for image_id in bundle.image_ids:
        results = _unmade(bench, bundle, image_id)
        if results and bundle.points[0].control != "nearest":
            groups.setdefault(tuple(result.point for result in results), {})[image_id] = results
    for wanted in groups.values():
        if bench.job.networks.device.type == "cpu":
            yield from (_Batch([image_id], {image_id: results}) for image_id, results in wanted.items())
            continue
        filler = next(iter(wanted))
        places = [image_id if image_id in wanted else filler for image_id in bundle.image_ids]
        yield _Batch(places + [filler] * (bench.job.config.evaluation.batch_size - len(places)), wanted)


def _made(bench: Bench, bundle: Bundle, batch: _Batch) -> list[Reconstruction]:
    """Make the pictures of a forward batch."""
    config, point = bench.job.config_at(bundle.points[0]), bundle.points[0]
    targets = bench.targets(point, bundle.subject)
    return reconstruct(batch.places, batch.results, config, bench.sampler(point), targets)


def _unmade(bench: Bench, bundle: Bundle, image_id: int) -> list[Result]:
    """Return where the pictures of an image go that are neither judged nor made."""
    layout, prints, subject = bench.job.layout, bench.prints, bundle.subject
    unmade = bench.unmade(bundle, image_id)
    return [
        Result(point, layout.pictures_of(point, subject, image_id), prints.pictures(point, subject))
        for point in bench.missing(bundle, image_id)
        if point in unmade
    ]


def _written_and_judged(bench: Bench, bundle: Bundle, made: Sequence[Reconstruction]) -> Steps:
    """Write the pictures of a bundle and judge them: the disk's and the processor's work beside the next bundle."""
    config = bench.job.config_at(bundle.points[0])
    for reconstruction in made:
        reconstruction.publish(config.sampler)
        yield
    if bundle.points[0].control == "nearest":
        for image_id in bundle.image_ids:
            for result in _unmade(bench, bundle, image_id):
                found = read_record(bench.job.layout.nearest(bundle.subject))["nearest"][str(image_id)]
                copy_picture(result, bench.job.source, found, image_id, config.evaluation.num_repeats)
            yield
    yield from _judge(bench, bundle, bundle.image_ids)


def _judge(bench: Bench, bundle: Bundle, image_ids: Sequence[int]) -> Steps:
    """Judge reconstructions where that is missing, image by image."""
    job, prints, layout, subject = bench.job, bench.prints, bench.job.layout, bundle.subject
    verdicts = [
        Verdict(
            layout.judged(point, subject) / image_name(image_id),
            prints.judged(point, subject),
            layout.original_of(image_id),
            layout.pictures_of(point, subject, image_id),
        )
        for image_id in image_ids
        for point in bench.missing(bundle, image_id)
    ]
    yield from judge_all(verdicts, job.protocol, bench.judges)


def score_tasks(bench: Bench) -> list[Task]:
    """Return one task per point and subject, and one per subject and way of decoding for retrieval."""
    job = bench.job
    tasks = [_score_task(bench, point, subject) for point in distinct_points(job.points) for subject in job.subjects]
    retrieval = [_retrieval_task(bench, point, subject) for point in job.decodings() for subject in job.subjects]
    return [*retrieval, *tasks]


def _score_task(bench: Bench, point: Point, subject: int) -> Task:
    job, layout = bench.job, bench.job.layout
    folder, fingerprint = layout.score(point, subject), bench.prints.score(point, subject)

    def work() -> Steps:
        ids, scores = job.images(subject), judge_scores(bench.judges.features)
        judged = JudgedImages(
            [layout.judged(point, subject) / image_name(image_id) for image_id in ids],
            [layout.judged_originals / image_name(image_id) for image_id in ids],
            job.config.evaluation.num_repeats,
        )
        arrays: dict[str, torch.Tensor] = {}
        for key, array in score_images(judged, scores, job.protocol):
            arrays[key] = array
            yield
        if point.control == "nearest":  # copies of one picture agree by construction
            arrays = {key: array for key, array in arrays.items() if not key.startswith(EACH + "repeat_")}
        scored = scored_arrays(arrays, bench.summed_repeats, job.protocol.distractors, bench.statistics)
        yield
        scored |= scored_sets(judged, scores, job.protocol, bench.statistics)
        yield
        metrics = {name: item.as_json() for name, item in scored.items()}
        groups = group_metrics(arrays, ids, job.image_groups, bench.summed_repeats, bench.statistics)
        facts = {"metrics": metrics, "groups": groups, "image_ids": list(ids), "subject": subject}
        kept = {**arrays, **kept_arrays(scored)}
        publish(folder, fingerprint, facts, lambda staging: write_staged(staging / ARRAYS, kept))

    name = f"score_{job.layout.protocol}_{point.name}_{subject_name(subject)}"
    return Task(name, lambda: bench.has(folder, fingerprint), work)


def _retrieval_task(bench: Bench, point: Point, subject: int) -> Task:
    job, folder = bench.job, bench.job.layout.retrieval(point, subject)
    fingerprint = bench.prints.retrieval(point, subject)

    def work() -> Steps:
        predicted = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
        name = compared_target(bench, point, subject)
        true = TrueTargets(job.source)
        ids = job.images(subject)
        metrics, arrays = retrieval_metrics(predicted, true, name, ids, bench.statistics)
        yield
        facts = {"metrics": metrics, "image_ids": list(ids)}
        publish(folder, fingerprint, facts, lambda staging: write_staged(staging / ARRAYS, arrays))

    return Task(f"retrieval_{folder.name}", lambda: bench.has(folder, fingerprint), work)


def compared_target(bench: Bench, point: Point, subject: int) -> str:
    """Return the target that retrieval compares: the deepest guidance layer that is decoded, else the semantic one."""
    job = bench.job
    if not job.is_decoded(point):
        return GUIDANCE[-1]
    names = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject)).names
    return next((name for name in reversed(GUIDANCE) if name in names), SEMANTIC)
