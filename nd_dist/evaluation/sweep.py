"""Choose a guidance point from an evaluation of *training* images, by a rule that is fixed before. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.units import Point


@dataclass(frozen=True)
class Choice:
    """The chosen point.

    Args:
        point: Guidance point.
        metric: Metric that decided.
        value: Its mean over subjects there.
        others: Every other point's value, best first.
    """

    point: Point
    metric: str
    value: float
    others: tuple[tuple[Point, float], ...]


def select(report: Mapping[str, Any], metric: str = "pixcorr") -> Choice:
    """Return the point that is best by one metric, averaged over subjects.

    Of equal points the one with less guidance wins (smaller kappa, then smaller eta).

    Args:
        report: Content of a metrics.json that was made with ``split="train"``.
        metric: Name of the metric; its own direction counts.

    Raises:
        ConfigError: no point has the metric, or subjects have different points.
        DataError: the report is one of test images: choosing there would make the reported number optimistic.
    """
    if report.get("split") == "test":
        raise DataError(
            "A guidance point must not be chosen on the test images that it is reported on.",
            expected="a report of training images",
            todo="evaluate the grid with split=train first",
        )
    values: dict[Point, list[float]] = {}
    higher_is_better = True
    for entry in report["points"]:
        if metric in entry["metrics"]:
            values.setdefault(Point(entry["kappa"], entry["eta"]), []).append(entry["metrics"][metric]["value"])
            higher_is_better = bool(entry["metrics"][metric]["higher_is_better"])
    if not values:
        known = sorted({name for entry in report["points"] for name in entry["metrics"]})
        raise ConfigError("No guidance point has the metric of the rule.", expected=", ".join(known), found=metric)
    if len({len(found) for found in values.values()}) > 1:
        raise ConfigError("Subjects were evaluated at different guidance points.", found=sorted(values))
    means = {point: math.fsum(found) / len(found) for point, found in values.items()}
    sign = -1.0 if higher_is_better else 1.0
    ranked = sorted(means, key=lambda point: (sign * means[point], point))
    return Choice(ranked[0], metric, means[ranked[0]], tuple((point, means[point]) for point in ranked[1:]))
