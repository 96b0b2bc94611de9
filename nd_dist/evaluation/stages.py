"""The tasks of each phase of an evaluation: for each, whether its result is there, and how to make it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.points.layout import ARRAYS
from nd_dist.evaluation.points.units import Bundle, Point, distinct_points, image_name, subject_name
from nd_dist.evaluation.reconstruction.controls import nearest_images
from nd_dist.evaluation.reconstruction.costs import StepCount, cost_class, unit_steps
from nd_dist.evaluation.reconstruction.decode import (
    DecodeSettings,
    StoredTargets,
    TrueTargets,
    decode_subject,
    decoder_predict,
)
from nd_dist.evaluation.reconstruction.reconstruct import Result, copy_picture, reconstruct_image, store_original
from nd_dist.evaluation.scoring.groups import group_metrics
from nd_dist.evaluation.scoring.judging import Judges, Verdict, judge_all
from nd_dist.evaluation.scoring.retrieved import retrieval_metrics
from nd_dist.evaluation.scoring.score import JudgedImages, judge_scores, score_images, scored_sets
from nd_dist.fanout.results import publish, read_record, write_staged
from nd_dist.fanout.tasks import Task
from nd_dist.metrics.scores import EACH, kept_arrays, scored_arrays
from nd_dist.schema import GUIDANCE, SEMANTIC

CALIBRATION_IMAGES = 2  # the first warms up; the last is timed


def decode_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject and way of decoding: predict its targets."""
    job = bench.job
    return [_decode_task(bench, point, subject) for point in job.decodings() for subject in job.subjects]


def _decode_task(bench: Bench, point: Point, subject: int) -> Task:
    job, fingerprint = bench.job, bench.prints.decoded(point, subject)
    folder = job.layout.decoded(point, subject)

    def write(staging: Path) -> None:
        predict = decoder_predict(job.decoder_dir, subject)
        config = job.config_at(point)
        evaluation = config.evaluation
        settings = DecodeSettings(job.z_calibration(point), config.seed, evaluation.two_repeats, evaluation.calibrated)
        decode_subject(staging, predict, job.source, subject, job.split_images(subject), settings)

    def work() -> None:
        publish(folder, fingerprint, {"image_ids": job.split_images(subject)}, write)

    return Task(f"decode_{folder.name}", lambda: bench.has(folder, fingerprint), work)


def nearest_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject for the control ``nearest``: find each image's nearest training image."""
    points = [point for point in bench.job.points if point.control == "nearest"]
    return [_nearest_task(bench, point, subject) for point in points for subject in bench.job.subjects]


def _nearest_task(bench: Bench, point: Point, subject: int) -> Task:
    job, folder, fingerprint = bench.job, bench.job.layout.nearest(subject), bench.prints.pictures(point, subject)

    def work() -> None:
        predicted = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
        predicted_or_true = predicted if job.is_decoded(point) else TrueTargets(job.source)
        name = _compared_target(bench, point, subject)
        candidates = job.source.images(subject, "train")
        found = nearest_images(predicted_or_true, TrueTargets(job.source), name, job.images(subject), candidates)
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

    def work() -> None:
        verdicts = []
        for image_id in image_ids:
            original, folder = job.layout.original_of(image_id), judged / image_name(image_id)
            if not bench.has(original, prints.originals):
                store_original(original, prints.originals, job.source, image_id)
            if not bench.has(folder, prints.judged_originals):
                verdicts.append(Verdict(folder, prints.judged_originals, original))
        judge_all(verdicts, job.protocol, Judges(bench.judges.features), bench.check_stop)

    return Task(f"original_{index:05d}", is_done, work)


def calibration_tasks(bench: Bench) -> list[Task]:
    """Return one task per cost class: make and time a few units, which count as done afterwards."""
    classes: dict[str, dict[str, Bundle]] = {}
    for bundle in bench.job.bundles():
        if bundle.points[0].control == "none":
            classes.setdefault(cost_class(bundle.points[0]), {}).setdefault(_kind(bundle), bundle)
    return [_calibration_task(bench, name, list(bundles.values())) for name, bundles in classes.items()]


def _kind(bundle: Bundle) -> str:
    return "guided" if bundle.points[-1].is_guided else "plain"


def _calibration_task(bench: Bench, name: str, bundles: Sequence[Bundle]) -> Task:
    folder, fingerprint = bench.job.layout.costs / name, bench.prints.judged(bundles[0].points[0], bundles[0].subject)

    def work() -> None:
        measured = []
        for bundle in bundles:
            config = bench.job.config_at(bundle.points[0])
            timed: list[tuple[StepCount, float]] = []
            for image_id in bundle.image_ids[:CALIBRATION_IMAGES]:
                missing = bench.unmade(bundle, image_id)
                bench.sampler(bundle.points[0])  # loading is not what a unit costs
                before = time.monotonic()
                _make_pictures(bench, bundle, image_id)
                _judge(bench, bundle, [image_id])
                if missing:
                    timed.append((unit_steps(config, missing), time.monotonic() - before))
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

    def work() -> None:
        for image_id in bundle.image_ids:
            if bench.missing(bundle, image_id):
                bench.check_stop()
                _make_pictures(bench, bundle, image_id)
        _judge(bench, bundle, bundle.image_ids)

    work_of_one = unit_steps(bench.job.config_at(bundle.points[0]), bundle.points)
    weight = bench.cost_of(bundle.points[0]).seconds(work_of_one) * len(bundle.image_ids)
    return Task(bundle.name, is_done, work, weight)


def _make_pictures(bench: Bench, bundle: Bundle, image_id: int) -> None:
    """Make one image's reconstructions at the points where they are missing."""
    job, prints, layout, subject = bench.job, bench.prints, bench.job.layout, bundle.subject
    unmade = [
        Result(point, layout.pictures_of(point, subject, image_id), prints.pictures(point, subject))
        for point in bench.missing(bundle, image_id)
        if point in bench.unmade(bundle, image_id)
    ]
    if not unmade:
        return
    config = job.config_at(bundle.points[0])
    if unmade[0].point.control == "nearest":
        nearest = read_record(layout.nearest(subject))["nearest"][str(image_id)]
        copy_picture(unmade[0], job.source, nearest, image_id, config.evaluation.num_repeats)
    else:
        sampler = bench.sampler(bundle.points[0])
        reconstruct_image(unmade, config, sampler, bench.targets(bundle.points[0], subject), image_id)


def _judge(bench: Bench, bundle: Bundle, image_ids: Sequence[int]) -> None:
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
    judge_all(verdicts, job.protocol, bench.judges, bench.check_stop)


def score_tasks(bench: Bench) -> list[Task]:
    """Return one task per point and subject, and one per subject and way of decoding for retrieval."""
    job = bench.job
    tasks = [_score_task(bench, point, subject) for point in distinct_points(job.points) for subject in job.subjects]
    retrieval = [_retrieval_task(bench, point, subject) for point in job.decodings() for subject in job.subjects]
    return [*retrieval, *tasks]


def _score_task(bench: Bench, point: Point, subject: int) -> Task:
    job, layout = bench.job, bench.job.layout
    folder, fingerprint = layout.score(point, subject), bench.prints.score(point, subject)

    def work() -> None:
        ids, scores = job.images(subject), judge_scores(bench.judges.features)
        judged = JudgedImages(
            [layout.judged(point, subject) / image_name(image_id) for image_id in ids],
            [layout.judged_originals / image_name(image_id) for image_id in ids],
            job.config.evaluation.num_repeats,
        )
        arrays = score_images(judged, scores, job.protocol)
        if point.control == "nearest":  # copies of one picture agree by construction
            arrays = {key: array for key, array in arrays.items() if not key.startswith(EACH + "repeat_")}
        scored = scored_arrays(arrays, bench.summed_repeats, job.protocol.distractors, bench.statistics)
        scored |= scored_sets(judged, scores, job.protocol, bench.statistics)
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

    def work() -> None:
        predicted = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
        name = _compared_target(bench, point, subject)
        true = TrueTargets(job.source)
        ids = job.images(subject)
        metrics, arrays = retrieval_metrics(predicted, true, name, ids, bench.statistics)
        facts = {"metrics": metrics, "image_ids": list(ids)}
        publish(folder, fingerprint, facts, lambda staging: write_staged(staging / ARRAYS, arrays))

    return Task(f"retrieval_{folder.name}", lambda: bench.has(folder, fingerprint), work)


def _compared_target(bench: Bench, point: Point, subject: int) -> str:
    """Return the target that retrieval compares: the deepest guidance layer that is decoded, else the semantic one."""
    folder = bench.job.layout.decoded(point, subject)
    has_true_targets = not bench.job.is_decoded(point)
    found = (name for name in reversed(GUIDANCE) if has_true_targets or (folder / f"{name}.npy").exists())
    return next(found, SEMANTIC)
