"""Means over seeds and subjects, and paired tests between points: against no guidance and the recipe's point.

Of many points that are tested, one looks good by chance, so the p values of the points that are compared with one
reference are corrected together (``nd_dist.metrics.statistics.permutation``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nd_dist.evaluation.points.units import Point
from nd_dist.metrics.statistics.permutation import flip_p_values
from nd_dist.metrics.statistics.scores import ADDED, Scores, Statistics, compare, mean_of_scores

ALL_SUBJECTS = 0  # stands where a subject does: the mean over all of them

Key = tuple[int, Point]
NO_GUIDANCE = "no guidance"
RECIPE = "the recipe's point"

Pair = tuple[int, Point, str, Scores, Scores]


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


def comparisons(scores: Mapping[Key, Scores], recipe: Point) -> list[dict[str, Any]]:
    """Return the comparisons of every point as JSON, by subject and point.

    Args:
        scores: (subject, point) -> its scores, means among them.
        recipe: The recipe's own point.
    """
    averaged = {(subject, point.without_seed) for subject, point in scores if point.is_seed_mean}
    pairs: list[Pair] = []
    for (subject, point), own in scores.items():
        if (subject, point.without_seed) in averaged and not point.is_seed_mean:
            continue  # seeds are tested together, by their mean
        unguided = next(
            (
                other
                for (whose, against), other in scores.items()
                if (whose, against.settings, against.is_plain) == (subject, point.settings, True)
                and not against.is_guided
            ),
            None,
        )
        if unguided is not None and point.is_guided and point.is_plain:
            pairs.append((subject, point, NO_GUIDANCE, own, unguided))
        own_recipe = recipe.with_seed(point.seed) if point.is_seed_mean else recipe
        reference = scores.get((subject, own_recipe))
        if reference is not None and point != own_recipe and (point.is_guided or not point.is_plain):
            pairs.append((subject, point, RECIPE, own, reference))
    return tested(pairs)


def tested(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Return comparisons with a p value each, corrected over the points of one subject, reference and metric.

    A metric whose images add nothing of their own (KID's interval comes from sets) has a difference without p.
    """
    found = []
    families: dict[tuple[Any, ...], list[tuple[dict[str, Any], Any]]] = {}
    for subject, point, against, own, other in pairs:
        differences = {name: dataclasses.asdict(item) for name, item in compare(own, other).items()}
        for name, item in differences.items():
            item["p"] = None
            if ADDED + name in own.arrays and ADDED + name in other.arrays:
                each_N = own.arrays[ADDED + name] - other.arrays[ADDED + name]
                families.setdefault((subject, against, name, own.image_ids), []).append((item, each_N))
        found.append({**point.describe(), "subject": subject, "against": against, "differences": differences})
    for family in families.values():
        for (item, _), p in zip(family, flip_p_values(np.stack([each_N for _, each_N in family])), strict=True):
            item["p"] = p
    return found
