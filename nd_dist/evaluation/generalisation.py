"""Whether a decoder generalises, where a data set or the recipe names groups of test images.

Training pictures are judged once a subject by one network; what is found of a point and subject is part of its scores.
What is computed is ``nd_dist.metrics.generalisation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.checkpoint import read_tensors
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.points.layout import FEATURES
from nd_dist.evaluation.points.units import Point, subject_name
from nd_dist.evaluation.reconstruction.decode import StoredTargets, TrueTargets
from nd_dist.evaluation.scoring.judging import seen_features
from nd_dist.evaluation.scoring.score import JudgedImages
from nd_dist.fanout.results import publish, write_staged
from nd_dist.fanout.tasks import Steps, Task
from nd_dist.files import hash_json
from nd_dist.frozen.judges import Judge
from nd_dist.metrics.generalisation import ALL, KEY, drops, effective_dimension, per_image, scored_means, similarities
from nd_dist.metrics.statistics.scores import WINS, Scored

FORMAT = 1
TRAINED = "similarity to training pictures"
"""Stands in ``Job.absent`` where the source holds no pictures of training images."""
ROWS = "features"

Entry = dict[str, Any]  # Any: JSON


def trained_tasks(bench: Bench) -> list[Task]:
    """Return one task per subject: the features of its training pictures."""
    if not _is_wanted(bench) or TRAINED in bench.keys.absent or (judge := bench.deepest_judge) is None:
        return []
    return [_trained_task(bench, judge, subject) for subject in bench.job.subjects]


def generalisation(
    bench: Bench, point: Point, subject: int, judged: JudgedImages, arrays: Mapping[str, torch.Tensor]
) -> Entry:
    """Return what is found of a point and subject; empty where nothing was asked for.

    Args:
        bench: The rank's workplace.
        point: How.
        subject: Whose brain.
        judged: Its judged images.
        arrays: What its metrics are made of, see ``score_images``.
    """
    if not _is_wanted(bench):
        return {}
    job, judge, ids = bench.job, bench.deepest_judge, judged.image_ids
    place = {image_id: row for row, image_id in enumerate(ids)}
    members = {name: np.array([place[i] for i in group if i in place]) for name, group in job.image_groups.items()}
    members = {name: rows for name, rows in members.items() if len(rows)}
    found: Entry = _against_all(bench, arrays, members, len(ids))
    if judge is not None and TRAINED not in bench.keys.absent:
        seen_ND, repeats = judged.of(judge.name, job.protocol)
        trained_TD = read_tensors(_trained_folder(bench, subject) / FEATURES)[ROWS].numpy()
        values = similarities(list(repeats), seen_ND, trained_TD)
        every = {ALL: np.arange(len(ids)), **members}
        found["retrieval"] = _as_json({n: scored_means(values, rows, bench.statistics) for n, rows in every.items()})
        found["judge"] = judge.name
    if job.is_decoded(point):
        found["dimension"] = _dimensions(bench, point, subject)
    return {KEY: found}


def _is_wanted(bench: Bench) -> bool:
    return bench.job.split == "test" and bool(bench.job.image_groups)


def _trained_task(bench: Bench, judge: Judge, subject: int) -> Task:
    job = bench.job
    folder, ids = _trained_folder(bench, subject), job.source.images(subject, "train")
    fingerprint = _trained_fingerprint(bench, judge, subject)

    def work() -> Steps:
        rows = []
        for features_BD in seen_features(job.source, ids, judge, job.protocol):
            rows.append(features_BD)
            yield
        features = {ROWS: torch.cat(rows)}
        publish(folder, fingerprint, {"judge": judge.name}, lambda staging: write_staged(staging / FEATURES, features))

    return Task(f"trained_{subject_name(subject)}", lambda: bench.has(folder, fingerprint), work)


def _trained_folder(bench: Bench, subject: int) -> Path:
    return bench.job.layout.work / "trained" / bench.job.protocol.name / subject_name(subject)


def _trained_fingerprint(bench: Bench, judge: Judge, subject: int) -> str:
    trained = bench.job.source.images(subject, "train")
    return hash_json([FORMAT, judge.name, bench.keys.key("judged_originals"), trained])


def _against_all(
    bench: Bench, arrays: Mapping[str, torch.Tensor], members: Mapping[str, npt.NDArray[np.int64]], num_images: int
) -> Entry:
    """Return, of every group, two-way identification among all test images, and how far it lies from the others."""
    each = per_image(arrays, bench.summed_repeats, bench.job.protocol.distractors)
    pairs = {name: values for name, values in each.items() if WINS + name in arrays}
    smaller = {name: rows for name, rows in members.items() if len(rows) < num_images}
    among = {name: scored_means(pairs, rows, bench.statistics) for name, rows in members.items()}
    apart = {name: drops(each, rows, bench.statistics) for name, rows in smaller.items()}
    return {"among_all": _as_json(among), "drop": _as_json(apart)}


def _as_json(scored: Mapping[str, Mapping[str, Scored]]) -> Entry:
    return {name: {key: item.as_json() for key, item in items.items()} for name, items in scored.items()}


def _dimensions(bench: Bench, point: Point, subject: int) -> Entry:
    """Return along how many directions decoded and true features of the test images vary."""
    job, ids, name = bench.job, bench.job.images(subject), bench.compared_target(point, subject)
    predicted = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
    decoded, true = (effective_dimension(targets.rows(name, ids)) for targets in (predicted, TrueTargets(job.source)))
    return {"target": name, "decoded": decoded, "true": true, "n": len(ids)}
