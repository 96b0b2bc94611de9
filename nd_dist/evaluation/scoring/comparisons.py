"""Paired tests between points on the same images: each against no guidance, and each against the recipe's point.

The bootstrap's resamples are shared by all points, so a difference is tested on pairs. Over the points of a sweep, p
values are also given after Holm's step-down correction: of many points that are tested, one looks good by chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.score import Scores, compare

NO_GUIDANCE = "no guidance"
RECIPE = "the recipe's point"


def comparisons(scores: Mapping[tuple[int, Point], Scores], recipe: Point) -> list[dict[str, Any]]:
    """Return the comparisons of every point as JSON, by subject and point.

    Args:
        scores: (subject, point) -> its scores.
        recipe: The recipe's own point.
    """
    found = []
    for (subject, point), own in scores.items():
        plain = {key: value for key, value in scores.items() if key[0] == subject and key[1].control == "none"}
        unguided = next(
            (value for (_, other), value in plain.items() if not other.is_guided and other.settings == point.settings),
            None,
        )
        if unguided is not None and point.is_guided and point.control == "none":
            found.append(_entry(subject, point, NO_GUIDANCE, own, unguided))
        reference = scores.get((subject, recipe))
        if reference is not None and point != recipe and (point.is_guided or point.control != "none"):
            found.append(_entry(subject, point, RECIPE, own, reference))
    _add_holm(found)
    return found


def _entry(subject: int, point: Point, against: str, own: Scores, other: Scores) -> dict[str, Any]:
    differences = {name: dataclasses.asdict(value) for name, value in compare(own, other).items()}
    return {**point.describe(), "subject": subject, "against": against, "differences": differences}


def _add_holm(entries: Sequence[Mapping[str, Any]]) -> None:
    """Add ``p_holm`` to every difference: corrected over the points of one subject, reference and metric."""
    families: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        for name, difference in entry["differences"].items():
            key = (entry["subject"], entry["against"], name)
            families.setdefault(key, []).append(difference)
    for family in families.values():
        for difference, p in zip(family, holm([item["p"] for item in family]), strict=True):
            difference["p_holm"] = p


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values after Holm's step-down correction, in the given order.

    Source: Holm (1979).
    """
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected
