"""The tasks of each phase of an evaluation: for each, whether its result is there, and how to make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nd_dist.checkpoint import write_tensors
from nd_dist.errors import Requeue
from nd_dist.evaluation.decode import (
    DecodeSettings,
    ImageTargets,
    StoredTargets,
    TrueTargets,
    decode_subject,
    decoder_predict,
)
from nd_dist.evaluation.job import Fingerprints, Job
from nd_dist.evaluation.judging import judge_image, judge_original
from nd_dist.evaluation.layout import ARRAYS
from nd_dist.evaluation.leases import Task
from nd_dist.evaluation.networks import Sampler
from nd_dist.evaluation.reconstruct import reconstruct_image, store_original
from nd_dist.evaluation.records import has_result, publish, read_record
from nd_dist.evaluation.retrieved import retrieval_metrics
from nd_dist.evaluation.score import JudgedImages, Statistics, judge_scores, metrics_of, score_images
from nd_dist.evaluation.units import Group, Point, distinct_points, image_name, subject_name
from nd_dist.frozen.judges import Judge
from nd_dist.schema import GUIDANCE, SEMANTIC


class Bench:
    """What the tasks of one rank share: the job, fingerprints, and networks that are loaded on first use.

    Args:
        job: What is evaluated.
        prints: Fingerprints agreed on by all ranks.
        should_stop: Asked between images.
    """

    def __init__(self, job: Job, prints: Fingerprints, should_stop: Callable[[], bool]) -> None:
        self.job, self.prints, self.should_stop = job, prints, should_stop
        self._seen: set[tuple[Path, str]] = set()

    @cached_property
    def sampler(self) -> Sampler:
        """The guided sampler."""
        return self.job.networks.sampler()

    @cached_property
    def judges(self) -> Sequence[Judge]:
        """The metric networks."""
        return self.job.networks.judges()

    @property
    def statistics(self) -> Statistics:
        """How intervals are made."""
        return Statistics(self.job.config.evaluation.bootstrap, self.job.config.seed)

    @property
    def is_decoded(self) -> bool:
        """Whether targets come from the decoder (otherwise they are the pictures' own)."""
        return self.job.config.evaluation.embeddings == "decoded"

    def targets(self, subject: int) -> ImageTargets:
        """Return the targets to reconstruct a subject's images from."""
        if not self.is_decoded:
            return TrueTargets(self.job.source)
        return StoredTargets(self.job.layout.decoded(subject), self.job.split_images(subject))

    def has(self, folder: Path, fingerprint: str) -> bool:
        """Return whether a result is there; a result that was seen once is not looked for again."""
        key = (folder, fingerprint)
        if key not in self._seen and has_result(folder, fingerprint):
            self._seen.add(key)
        return key in self._seen

    def check_stop(self) -> None:
        """Leave if the rank was asked to."""
        if self.should_stop():
            raise Requeue("The evaluation was asked to stop; finished images are kept.", todo="start it again")


def decode_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject: predict its targets."""
    return [_decode_task(bench, subject) for subject in bench.job.subjects] if bench.is_decoded else []


def _decode_task(bench: Bench, subject: int) -> Task:
    job, fingerprint = bench.job, bench.prints.decoded(subject)
    folder = job.layout.decoded(subject)

    def write(staging: Path) -> None:
        predict = decoder_predict(job.decoder_dir, subject)
        settings = DecodeSettings(job.config.evaluation, job.config.seed)
        decode_subject(staging, predict, job.source, subject, job.split_images(subject), settings)

    def work() -> None:
        publish(folder, fingerprint, {"image_ids": job.split_images(subject)}, write)

    return Task(f"decode_{subject_name(subject)}", lambda: bench.has(folder, fingerprint), work)


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
        for image_id in image_ids:
            original = job.layout.original_of(image_id)
            if not bench.has(original, prints.originals):
                store_original(original, prints.originals, job.source, image_id)
            folder = judged / image_name(image_id)
            if not bench.has(folder, prints.judged_originals):
                judge_original(folder, prints.judged_originals, original, job.protocol, bench.judges)

    return Task(f"original_{index:05d}", is_done, work)


def group_tasks(bench: Bench) -> list[Task]:
    """Return one task per group of units: reconstruct its images and judge them."""
    return [_group_task(bench, group) for group in bench.job.groups()]


def _group_task(bench: Bench, group: Group) -> Task:
    judged = bench.job.layout.judged(group.point, group.subject)
    fingerprint = bench.prints.judged(group.point, group.subject)

    def is_done() -> bool:
        return all(bench.has(judged / image_name(image_id), fingerprint) for image_id in group.image_ids)

    def work() -> None:
        for image_id in group.image_ids:
            if not bench.has(judged / image_name(image_id), fingerprint):
                bench.check_stop()
                _reconstruct_and_judge(bench, group.point, group.subject, image_id)

    return Task(group.name, is_done, work)


def _reconstruct_and_judge(bench: Bench, point: Point, subject: int, image_id: int) -> None:
    """Make one image's reconstructions where they are missing, then its metrics and features."""
    job, prints, layout = bench.job, bench.prints, bench.job.layout
    folder, pictures = layout.pictures_of(point, subject, image_id), prints.pictures(point, subject)
    if not bench.has(folder, pictures):
        reconstruct_image(folder, pictures, job.config, bench.sampler, bench.targets(subject), (point, image_id))
    judged = layout.judged(point, subject) / image_name(image_id)
    original = layout.original_of(image_id)
    judge_image(judged, prints.judged(point, subject), folder, original, job.protocol, bench.judges)


def score_tasks(bench: Bench) -> list[Task]:
    """Return one task per point and subject, and one per subject for retrieval."""
    job = bench.job
    tasks = [_score_task(bench, point, subject) for point in distinct_points(job.points) for subject in job.subjects]
    retrieval = [_retrieval_task(bench, subject) for subject in job.subjects] if bench.is_decoded else []
    return [*retrieval, *tasks]


def _score_task(bench: Bench, point: Point, subject: int) -> Task:
    job, layout = bench.job, bench.job.layout
    folder, fingerprint = layout.score(point, subject), bench.prints.score(point, subject)

    def work() -> None:
        ids = job.images(subject)
        judged = JudgedImages(
            [layout.judged(point, subject) / image_name(image_id) for image_id in ids],
            [layout.judged_originals / image_name(image_id) for image_id in ids],
            job.config.evaluation.num_repeats,
        )
        arrays = score_images(judged, judge_scores(bench.judges), job.protocol)
        metrics = metrics_of(arrays, summed_repeats(job), bench.statistics)
        facts = {"metrics": metrics, "image_ids": list(ids), "subject": subject}
        publish(folder, fingerprint, facts, lambda staging: write_tensors(staging / ARRAYS, arrays))

    name = f"score_{job.layout.protocol}_{point.name}_{subject_name(subject)}"
    return Task(name, lambda: bench.has(folder, fingerprint), work)


def summed_repeats(job: Job) -> int:
    """Return how many repeats the wins of a point are summed over."""
    return job.config.evaluation.num_repeats if job.protocol.repeats == "mean_of_scores" else 1


def _retrieval_task(bench: Bench, subject: int) -> Task:
    job, folder = bench.job, bench.job.layout.retrieval(subject)
    fingerprint = bench.prints.retrieval(subject)

    def work() -> None:
        predicted = StoredTargets(job.layout.decoded(subject), job.split_images(subject))
        name = _retrieval_target(job, subject)
        true = TrueTargets(job.source)
        metrics = retrieval_metrics(predicted, true, name, job.images(subject), bench.statistics)
        publish(folder, fingerprint, {"metrics": metrics}, lambda staging: None)

    return Task(f"retrieval_{subject_name(subject)}", lambda: bench.has(folder, fingerprint), work)


def _retrieval_target(job: Job, subject: int) -> str:
    """Return the target that retrieval compares: the deepest guidance layer that is decoded, else the semantic one."""
    folder = job.layout.decoded(subject)
    return next((name for name in reversed(GUIDANCE) if (folder / f"{name}.npy").exists()), SEMANTIC)


def point_metrics(bench: Bench, point: Point, subject: int) -> dict[str, Any]:
    """Return all metrics of a point and subject from its records on disk."""
    metrics: dict[str, Any] = dict(read_record(bench.job.layout.score(point, subject))["metrics"])
    if bench.is_decoded:
        metrics.update(read_record(bench.job.layout.retrieval(subject))["metrics"])
    return metrics
