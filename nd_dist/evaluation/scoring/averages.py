"""Means of scored points over seeds and over subjects: the field's row is the mean over subjects 1, 2, 5 and 7.

Subjects and seeds are fixed; what varies is the images, resampled jointly. Legend: N images, U images of any of the
scores, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.score import ADDED, DRAWS, RESAMPLED, Float64, Scored, Scores, Statistics
from nd_dist.metrics.bootstrap import mean_resampled
from nd_dist.metrics.retrieval import normal_interval

ALL_SUBJECTS = 0  # stands where a subject does: the mean over all of them

Key = tuple[int, Point]


def averages(scores: Mapping[Key, Scores], statistics: Statistics) -> dict[Key, Scores]:
    """Return the means over seeds of every subject, then the means over subjects of every point that all have.

    Args:
        scores: (subject, point) -> its scores.
        statistics: Resamples.
    """
    by_seed: dict[Key, list[Scores]] = {}
    for (subject, point), found in scores.items():
        by_seed.setdefault((subject, point.without_seed), []).append(found)
    means = {
        (subject, point.with_seed(f"mean of {len(found)}")): mean_of_scores(found, statistics)
        for (subject, point), found in by_seed.items()
        if len(found) > 1
    }
    subjects = sorted({subject for subject, _ in scores})
    of_subjects: dict[Point, list[Scores]] = {}
    for (_, point), found in sorted({**scores, **means}.items(), key=lambda item: (item[0][0], item[0][1].order)):
        of_subjects.setdefault(point, []).append(found)
    for point, every in of_subjects.items():
        if len(every) == len(subjects) > 1:
            means[ALL_SUBJECTS, point] = mean_of_scores(every, statistics)
    return means


def mean_of_scores(parts: Sequence[Scores], statistics: Statistics) -> Scores:
    """Return the mean of several scores, with intervals from images that are resampled jointly.

    Where the images differ, each part's mean over its own of the drawn images counts, linearised.
    """
    image_ids = tuple(sorted({image_id for part in parts for image_id in part.image_ids}))
    is_same = all(part.image_ids == image_ids for part in parts)
    metrics: dict[str, Mapping[str, Any]] = {}
    arrays: dict[str, Float64] = {}
    for name in sorted(set.intersection(*(set(part.metrics) for part in parts))):
        items = [part.metrics[name] for part in parts]
        value = math.fsum(float(item["value"]) for item in items) / len(parts)
        kept = {
            prefix: [part.arrays[prefix + name] for part in parts]
            for prefix in (RESAMPLED, ADDED, DRAWS)
            if all(prefix + name in part.arrays for part in parts)
        }
        added_U = _joined(kept[ADDED], parts, image_ids) if ADDED in kept else None
        resampled_B = np.mean(kept[RESAMPLED], axis=0) if RESAMPLED in kept and is_same else None
        if not is_same and added_U is not None:
            resampled_B = mean_resampled(added_U, statistics.counts(len(image_ids)))
        scored = Scored(value, len(image_ids), bool(items[0]["higher_is_better"]), resampled_B, added_U)
        found = {**items[0], **scored.as_json()}
        if DRAWS in kept and is_same:
            arrays[DRAWS + name] = np.mean(kept[DRAWS], axis=0)
            found["ci_low"], found["ci_high"] = normal_interval(arrays[DRAWS + name])
        metrics[name] = found
        arrays |= {RESAMPLED + name: resampled_B} if resampled_B is not None else {}
        arrays |= {ADDED + name: added_U} if added_U is not None else {}
    return Scores(metrics, image_ids, arrays)


def _joined(added: Sequence[Float64], parts: Sequence[Scores], image_ids: tuple[int, ...]) -> Float64:
    """Return (U,) what each image adds to the mean of the parts."""
    place = {image_id: number for number, image_id in enumerate(image_ids)}
    total_U = np.zeros(len(image_ids))
    for part, added_N in zip(parts, added, strict=True):
        total_U[[place[image_id] for image_id in part.image_ids]] += added_N / len(added_N)
    return np.asarray(total_U * (len(image_ids) / len(parts)), dtype=np.float64)
