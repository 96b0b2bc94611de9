"""The tasks of decoding: every batch of a subject's images, then the statistics that standardise what was predicted.

``test_set`` takes the statistics of the predictions themselves (as published: every image's z then depends on which
images are decoded together, so always a whole split is). ``stored`` takes those of predictions for the subject's
training images, so that an image can be decoded alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from nd_dist.checkpoint import read_tensors
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.reconstruction.decode import (
    PREDICTIONS,
    STATISTICS,
    STATISTICS_FOLDER,
    SUMMARY,
    Moments,
    Predictor,
    Summary,
    batch_name,
    batches,
    prediction_seeds,
    statistics_of,
)
from nd_dist.fanout.results import publish, write_staged
from nd_dist.fanout.tasks import Steps, Task
from nd_dist.files import hash_json
from nd_dist.schema import role_of


class _Batch(NamedTuple):
    """Images of a subject that are decoded together, at a point with its decoding settings; of training images only
    the statistics are kept."""

    point: Point
    subject: int
    number: int
    image_ids: Sequence[int]
    is_training: bool


def _batches(bench: Bench) -> Iterator[_Batch]:
    """Yield every batch that has to be decoded."""
    job = bench.job
    for point in job.decodings():
        for subject in job.subjects:
            for number, image_ids in enumerate(batches(job.split_images(subject))):
                yield _Batch(point, subject, number, image_ids, is_training=False)
            if job.z_calibration(point) == "stored":
                for number, image_ids in enumerate(batches(job.source.images(subject, "train"))):
                    yield _Batch(point, subject, number, image_ids, is_training=True)


def decode_tasks(bench: Bench) -> list[Task]:
    """Return one task per batch; the decoders live as long as the tasks do."""
    job = bench.job
    predictors = {folder: job.networks.decoder(folder) for folder in {job.decoder_of(p) for p in job.decodings()}}
    return [_decode_task(bench, predictors[job.decoder_of(batch.point)], batch) for batch in _batches(bench)]


def _decode_task(bench: Bench, predictor: Predictor, batch: _Batch) -> Task:
    """Return the task of one batch: its predictions, and a summary of those targets that are standardised."""
    point, subject, number, image_ids, is_training = batch
    job, config = bench.job, bench.job.config_at(point)
    folder = job.layout.decoded(point, subject) / batch_name(number, is_training)
    key = hash_json([bench.keys.key("decoded", point, subject), list(image_ids)])

    def work() -> Steps:
        voxels_BV = job.source.voxels(subject, image_ids, two_repeats=config.evaluation.two_repeats)
        seeds = prediction_seeds(config.seed, subject, image_ids)
        made: dict[str, torch.Tensor] = {}
        for name in predictor.names:
            is_standardised = role_of(name) in config.evaluation.calibrated
            if is_training and not is_standardised:
                continue
            values = predictor.predict(name, subject, voxels_BV, seeds)
            made |= Summary.of(values).tensors(name) if is_standardised else {}
            made |= {} if is_training else {name: torch.from_numpy(values)}
            yield
        facts = {"image_ids": list(image_ids)}
        publish(folder, key, facts, lambda staging: write_staged(staging / PREDICTIONS, made))

    return Task(f"decode_{folder.parent.name}_{folder.name}", lambda: bench.has(folder, key), work)


def statistics_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject and way of decoding: the statistics that its predictions are standardised with."""
    job = bench.job
    return [_statistics_task(bench, point, subject) for point in job.decodings() for subject in job.subjects]


def _statistics_task(bench: Bench, point: Point, subject: int) -> Task:
    job, rule = bench.job, bench.job.z_calibration(point)
    folder = job.layout.decoded(point, subject) / STATISTICS_FOLDER
    image_ids, training_ids = job.split_images(subject), job.source.images(subject, "train")
    key = hash_json([bench.keys.key("decoded", point, subject), list(image_ids)])

    def work() -> Steps:
        predicted: dict[str, Moments] = {}
        wanted: dict[str, Moments] = {}
        used = {"none": [], "test_set": image_ids, "stored": training_ids}[rule]
        for index, ids in enumerate(batches(used)):
            tensors = read_tensors(folder.parent / batch_name(index, rule == "stored") / PREDICTIONS)
            for name in (key.removesuffix(SUMMARY[0]) for key in tensors if key.endswith(SUMMARY[0])):
                summary = Summary(len(ids), *(tensors[name + key].numpy() for key in SUMMARY))
                predicted.setdefault(name, Moments()).add(summary)
            yield
        for ids in batches(training_ids) if predicted else []:
            for name in predicted:
                wanted.setdefault(name, Moments()).add(Summary.of(job.source.targets(name, ids)))
            yield
        found = statistics_of(predicted, wanted, job.config_at(point).evaluation.calibrated_by)
        facts = {"image_ids": list(image_ids)}
        publish(folder, key, facts, lambda staging: write_staged(staging / STATISTICS, found))

    return Task(f"statistics_{folder.parent.name}", lambda: bench.has(folder, key), work)
