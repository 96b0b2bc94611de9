"""Paired tests between points on the same images: each against no guidance, and each against the recipe's point.

Of many points that are tested, one looks good by chance, so the p values of the points that are compared with one
reference are corrected together (``nd_dist.metrics.permutation``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.averages import Key
from nd_dist.evaluation.scoring.score import ADDED, Scores, compare
from nd_dist.metrics.permutation import flip_p_values

NO_GUIDANCE = "no guidance"
RECIPE = "the recipe's point"

Pair = tuple[int, Point, str, Scores, Scores]


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
    return _tested(pairs)


def _tested(pairs: list[Pair]) -> list[dict[str, Any]]:
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
