"""The tasks of each phase of an evaluation: for each, whether its result is there, and how to make it."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.generalisation import generalisation
from nd_dist.evaluation.points.layout import ARRAYS, FEATURES
from nd_dist.evaluation.points.units import Bundle, Point, subject_name
from nd_dist.evaluation.reconstruction.controls import nearest_images
from nd_dist.evaluation.reconstruction.costs import cost_class, unit_steps
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
from nd_dist.evaluation.scoring.retrieved import correlation_metrics, retrieval_metrics
from nd_dist.evaluation.scoring.score import JudgedImages, JudgedSheets, score_images, scored_sets
from nd_dist.fanout.results import publish, read_record, write_staged
from nd_dist.fanout.tasks import Steps, Task, Work
from nd_dist.metrics.statistics.scores import EACH, kept_arrays, scored_arrays

CALIBRATION_BUNDLES = 2  # the first warms up; the last is timed


def nearest_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject for the control ``nearest``: find each image's nearest training image."""
    points = [point for point in bench.job.points if point.control == "nearest"]
    return [_nearest_task(bench, point, subject) for point in points for subject in bench.job.subjects]


def _nearest_task(bench: Bench, point: Point, subject: int) -> Task:
    job, folder, key = bench.job, bench.job.layout.nearest(subject), bench.keys.key("pictures", point, subject)

    def work() -> Steps:
        compared, name = bench.targets(point, subject), bench.compared_target(point, subject)
        ids, candidates = job.images(subject), job.source.images(subject, "train")
        found: dict[int, int] = {}
        for nearest in nearest_images(compared, TrueTargets(job.source), name, ids, candidates):
            found = nearest
            yield
        facts = {"target": name, "nearest": {str(image_id): chosen for image_id, chosen in found.items()}}
        publish(folder, key, facts, lambda staging: None)

    return Task(f"nearest_{subject_name(subject)}", lambda: bench.has(folder, key), work)


def original_tasks(bench: Bench) -> list[Task]:
    """Return the tasks that store and judge the pictures that were seen, some images each; none if all is scored."""
    pairs = itertools.product(bench.job.points, bench.job.subjects)
    if all(bench.has_score(point, subject) for point, subject in pairs):
        return []
    return [_original_task(bench, ids, folder, key) for ids, folder, key in bench.original_sheets()]


def _original_task(bench: Bench, image_ids: Sequence[int], folder: Path, key: str) -> Task:
    layout, original_key = bench.job.layout, bench.keys.key("originals")

    def work() -> Steps:
        for image_id in image_ids:
            place = layout.original_of(image_id)
            if not bench.has(place, original_key):
                store_original(place, original_key, bench.job.source, image_id)
        verdict = Verdict(folder, key, {image_id: layout.original_of(image_id) for image_id in image_ids})
        yield from judge_all([verdict], bench.job.protocol, Judges(bench.judges.features, (), bench.judges.device))

    return Task(f"original_{folder.name}", lambda: bench.has(folder, key), work)


def calibration_tasks(bench: Bench) -> list[Task]:
    """Return one task per cost class: make and time a few bundles, which count as done afterwards."""
    classes: dict[str, dict[str, list[Bundle]]] = {}
    for bundle in bench.job.bundles():
        if bundle.points[0].control == "none":
            kinds = classes.setdefault(cost_class(bundle.points[0]), {})
            kinds.setdefault("guided" if bundle.points[-1].is_guided else "plain", []).append(bundle)
    return [_calibration_task(bench, name, list(kinds.values())) for name, kinds in classes.items()]


def _calibration_task(bench: Bench, name: str, kinds: Sequence[Sequence[Bundle]]) -> Task:
    first = kinds[0][0]
    folder, key = bench.job.layout.costs / name, bench.keys.key("judged", first.points[0], first.subject)

    def work() -> Steps:
        measured = []
        for bundles in kinds:
            timed: list[dict[str, float]] = []
            for bundle in [bundle for bundle in bundles if bench.missing(bundle)][:CALIBRATION_BUNDLES]:
                points = bench.missing(bundle)
                bench.sampler(bundle.points[0])  # loading is not what a unit costs
                before = time.monotonic()
                yield from _bundle_work(bench, bundle)
                steps = unit_steps(bench.job.config_at(bundle.points[0]), points)
                seconds = (time.monotonic() - before) / len(bundle.image_ids)
                sizes = _sizes(bench, bundle, points[0])
                timed.append({"guided": steps.guided, "plain": steps.plain, "seconds": seconds, **sizes})
            measured += timed[-1:]
        publish(folder, key, {"measured": measured}, lambda staging: None)

    return Task(f"calibrate_{name}", lambda: bench.has(folder, key), work)


def _sizes(bench: Bench, bundle: Bundle, point: Point) -> dict[str, float]:
    """Return the bytes of a reconstruction of a bundle, and of its features."""
    folders = [bench.job.layout.pictures_of(point, bundle.subject, image_id) for image_id in bundle.image_ids]
    pictures = [path.stat().st_size for folder in folders for path in folder.glob("repeat-*.png")]
    features = (bench.sheet(bundle, point)[0] / FEATURES).stat().st_size
    return {"picture_bytes": sum(pictures) / len(pictures), "feature_bytes": features / len(pictures)}


def _bundle_work(bench: Bench, bundle: Bundle) -> Steps:
    """Do all the work of a bundle here and now."""
    rest = yield from _bundle_task(bench, bundle).work()
    yield from rest or ()


def measurements(bench: Bench) -> dict[str, list[dict[str, float]]]:
    """Return cost class -> what its calibration measured; a class without measurements is left out."""
    names = [task.name.removeprefix("calibrate_") for task in calibration_tasks(bench)]
    found = {name: read_record(bench.job.layout.costs / name).get("measured", []) for name in names}
    return {name: measured for name, measured in found.items() if measured}


def point_tasks(bench: Bench) -> list[Task]:
    """Return the tasks of all points: one per bundle, to reconstruct and judge its images; one to score each point.

    A point is scored soon after its last bundle, and what only its score needed is let go: there is never much of it.
    """
    tasks: list[Task] = []
    scores: list[Task] = []
    for (points, subject), bundles in itertools.groupby(
        bench.job.bundles(), key=lambda bundle: (bundle.points, bundle.subject)
    ):
        made = [_bundle_task(bench, bundle) for bundle in bundles]
        tasks += [*made, *scores]  # by now those before are done
        scores = [_score_task(bench, point, subject, tuple(task.name for task in made)) for point in points]
    retrieval = [
        _retrieval_task(bench, point, subject) for point in bench.job.decodings() for subject in bench.job.subjects
    ]
    return [*tasks, *scores, *retrieval]


def _bundle_task(bench: Bench, bundle: Bundle) -> Task:
    def work() -> Work:
        made: list[Reconstruction] = []
        for batch in _batches(bench, bundle):
            config, point = bench.job.config_at(bundle.points[0]), bundle.points[0]
            targets = bench.targets(point, bundle.subject)
            made += reconstruct(batch.places, batch.results, config, bench.sampler(point), targets)
            yield
        return _written_and_judged(bench, bundle, made)

    work_of_one = unit_steps(bench.job.config_at(bundle.points[0]), bundle.points)
    weight = bench.cost_of(bundle.points[0]).seconds(work_of_one) * len(bundle.image_ids)
    return Task(bundle.name, lambda: not bench.missing(bundle), work, weight)


class _Batch(NamedTuple):
    """A forward batch: the image at each place, and the images that are made in it with where their pictures go."""

    places: list[int]
    results: dict[int, list[Result]]


def _batches(bench: Bench, bundle: Bundle) -> Iterator[_Batch]:
    """Yield what is to be made of a bundle's pictures, a forward batch at a time.

    On a GPU a batch has a place for every image of a bundle, whose own place never changes; where one is made already
    its place is filled with one that is not. On a CPU, where that gains nothing, a batch has a single place.
    """
    groups: dict[tuple[int, tuple[Point, ...]], dict[int, list[Result]]] = {}
    points = bench.missing(bundle)
    for image_id in bundle.image_ids if bundle.points[0].control != "nearest" else ():
        unmade = sorted(_unmade(bench, points, bundle.subject, image_id), key=lambda result: result.first)
        for first, results in itertools.groupby(unmade, key=lambda result: result.first):
            found = list(results)
            groups.setdefault((first, tuple(result.point for result in found)), {})[image_id] = found
    for wanted in groups.values():
        if bench.job.networks.device.type == "cpu":
            yield from (_Batch([image_id], {image_id: results}) for image_id, results in wanted.items())
            continue
        filler = next(iter(wanted))
        places = [image_id if image_id in wanted else filler for image_id in bundle.image_ids]
        yield _Batch(places + [filler] * (bench.job.config.evaluation.batch_size - len(places)), wanted)


def _unmade(bench: Bench, points: Sequence[Point], subject: int, image_id: int) -> list[Result]:
    """Return where the pictures of an image go that are not all made."""
    layout, unmade = bench.job.layout, []
    for point in points:
        first = bench.repeats_made(point, subject, image_id)
        if first < bench.keys.num_repeats:
            place, key = layout.pictures_of(point, subject, image_id), bench.keys.key("pictures", point, subject)
            unmade.append(Result(point, place, key, first))
    return unmade


def _written_and_judged(bench: Bench, bundle: Bundle, made: Sequence[Reconstruction]) -> Steps:
    """Write the pictures of a bundle and judge them: the disk's and the processor's work beside the next bundle."""
    config, layout, subject = bench.job.config_at(bundle.points[0]), bench.job.layout, bundle.subject
    points = bench.missing(bundle)
    for reconstruction in made:
        reconstruction.publish(config.sampler)
        yield
    if bundle.points[0].control == "nearest":
        for image_id in bundle.image_ids:
            for result in _unmade(bench, points, subject, image_id):
                found = read_record(layout.nearest(subject))["nearest"][str(image_id)]
                copy_picture(result, bench.job.source, found, image_id, bench.keys.num_repeats)
            yield
    seen = {image_id: layout.original_of(image_id) for image_id in bundle.image_ids}
    verdicts = [
        Verdict(
            *bench.sheet(bundle, point),
            seen,
            {image_id: layout.pictures_of(point, subject, image_id) for image_id in bundle.image_ids},
            bench.keys.num_repeats,
        )
        for point in points
    ]
    yield from judge_all(verdicts, bench.job.protocol, bench.judges)


def _score_task(bench: Bench, point: Point, subject: int, after: tuple[str, ...]) -> Task:
    job, folder = bench.job, bench.job.layout.score(point, subject)

    def work() -> Steps:
        ids, scores = job.images(subject), {judge.name: judge.score for judge in bench.judges.features}
        bundles = [each for each in job.bundles() if each.subject == subject and point in each.points]
        sheets = JudgedSheets([bench.sheet(bundle, point)[0] for bundle in bundles])
        judged = JudgedImages(sheets, bench.judged_originals(), ids, bench.keys.num_repeats, job.networks.device)
        arrays: dict[str, torch.Tensor] = {}
        for name, array in score_images(judged, scores, job.protocol):
            arrays[name] = array
            yield
        kinds = dict(bench.kinds.seen(judged, subject, ids))
        yield
        if point.control == "nearest":  # copies of one picture agree by construction
            arrays = {name: array for name, array in arrays.items() if not name.startswith(EACH + "repeat_")}
        else:
            kinds |= bench.kinds.decoded(bench.targets(point, subject), subject, ids)
        arrays |= {EACH + name: torch.from_numpy(each_N) for name, each_N in kinds.items()}
        scored = scored_arrays(arrays, bench.summed_repeats, job.protocol.distractors, bench.statistics)
        yield
        scored |= scored_sets(judged, scores, job.protocol, bench.statistics)
        yield
        facts = {
            "metrics": {name: item.as_json() for name, item in scored.items()},
            "groups": group_metrics(arrays, ids, job.image_groups, bench.summed_repeats, bench.statistics),
            "failures": _failures(bench, point, subject),
            "image_ids": list(ids),
            "subject": subject,
            **generalisation(bench, point, subject, judged, arrays),
        }
        kept = {**arrays, **kept_arrays(scored)}
        key = bench.keys.key("score", point, subject)
        publish(folder, key, facts, lambda staging: write_staged(staging / ARRAYS, kept))
        _let_go(bench, point, subject)

    name = f"score_{job.layout.protocol}_{point.name}_{subject_name(subject)}"
    return Task(name, lambda: bench.has_score(point, subject), work, weight=0.0, after=after)


def _failures(bench: Bench, point: Point, subject: int) -> list[dict[str, Any]]:
    """Return the reconstructions of a point that were not finite: image, repeat, what and where in the run."""
    job = bench.job
    records = {image: read_record(job.layout.pictures_of(point, subject, image)) for image in job.images(subject)}
    return [
        {"image_id": image, **failure} for image, record in records.items() for failure in record.get("failures", [])
    ]


def _let_go(bench: Bench, point: Point, subject: int) -> None:
    """Remove what only the scores of a point needed, as the recipe says."""
    layout, evaluation = bench.job.layout, bench.job.config.evaluation
    if bench.job.round_images:
        return
    if not evaluation.keep_features:
        shutil.rmtree(layout.judged(point, subject), ignore_errors=True)
    if evaluation.keep_pictures is not None:
        for image_id in bench.job.images(subject)[evaluation.keep_pictures :]:
            shutil.rmtree(layout.pictures_of(point, subject, image_id), ignore_errors=True)


def _retrieval_task(bench: Bench, point: Point, subject: int) -> Task:
    job, folder = bench.job, bench.job.layout.retrieval(point, subject)
    key = bench.keys.key("retrieval", point, subject)

    def work() -> Steps:
        predicted = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
        name = bench.compared_target(point, subject)
        true = TrueTargets(job.source)
        ids = job.images(subject)
        metrics, arrays = retrieval_metrics(predicted, true, name, ids, bench.statistics)
        yield
        known = [name for name in predicted.names if name in job.config.data.targets]
        more, more_arrays = correlation_metrics(predicted, true, known, ids, bench.statistics)
        yield
        facts = {"metrics": {**metrics, **more}, "image_ids": list(ids)}
        publish(folder, key, facts, lambda staging: write_staged(staging / ARRAYS, {**arrays, **more_arrays}))

    return Task(f"retrieval_{folder.name}", lambda: bench.has(folder, key), work)
