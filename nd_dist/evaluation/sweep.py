"""Choose a guidance point from an evaluation of *training* images, by a rule that is fixed before. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.points.units import Point

Rule = Literal["best", "least_guidance"]


@dataclass(frozen=True)
class Candidate:
    """One point that could be chosen.

    Args:
        point: Guidance point, seeds left out.
        value: Mean of the metric over subjects and seeds.
        ci_low, ci_high: Means of the ends of its intervals.
    """

    point: Point
    value: float
    ci_low: float
    ci_high: float

    def describe(self) -> dict[str, Any]:
        """Return the candidate as JSON."""
        return {**self.point.describe(), "value": self.value, "ci_low": self.ci_low, "ci_high": self.ci_high}

    @property
    def guidance(self) -> tuple[float, float, str]:
        """What tells more guidance from less."""
        return self.point.kappa, self.point.eta, self.point.name


@dataclass(frozen=True)
class Choice:
    """The chosen point: the metric that decided, its direction, the rule, and the candidates, best first."""

    chosen: Candidate
    metric: str
    higher_is_better: bool
    rule: Rule
    ranked: tuple[Candidate, ...]

    def describe(self) -> dict[str, Any]:
        """Return the choice as JSON, the chosen candidate first."""
        others = [item.describe() for item in self.ranked if item != self.chosen]
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "rule": self.rule,
            "chosen": self.chosen.describe(),
            "candidates": [self.chosen.describe(), *others],
        }


def select(report: Mapping[str, Any], metric: str = "pixcorr", rule: Rule = "best") -> Choice:
    """Return the point that is best by one metric, averaged over subjects and seeds.

    Of equal points the one with less guidance wins (smaller kappa, then smaller eta).

    Args:
        report: Content of a metrics.json that was made with ``split="train"``.
        metric: Name of the metric; its own direction counts.
        rule: ``best``, or ``least_guidance``: the least guided point whose mean lies within the best one's interval.

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
    values: dict[Point, list[Mapping[str, Any]]] = {}
    for entry in report["points"]:
        if metric in entry["metrics"]:
            values.setdefault(Point.of(entry).without_seed, []).append(entry["metrics"][metric])
    if not values:
        known = sorted({name for entry in report["points"] for name in entry["metrics"]})
        raise ConfigError("No guidance point has the metric of the rule.", expected=", ".join(known), found=metric)
    if len({len(found) for found in values.values()}) > 1:
        raise ConfigError(
            "Subjects were evaluated at different guidance points.", found=sorted(point.name for point in values)
        )
    higher = bool(next(iter(values.values()))[0]["higher_is_better"])
    candidates = [Candidate(point, *(_mean(found, key) for key in _ENDS)) for point, found in values.items()]
    sign = -1.0 if higher else 1.0
    ranked = sorted(candidates, key=lambda item: (sign * item.value, *item.guidance))
    best = ranked[0]
    close = [item for item in ranked if best.ci_low <= item.value <= best.ci_high] or [best]
    chosen = best if rule == "best" else min(close, key=lambda item: item.guidance)
    return Choice(chosen, metric, higher, rule, tuple(ranked))


_ENDS = ("value", "ci_low", "ci_high")


def _mean(found: list[Mapping[str, Any]], key: str) -> float:
    numbers = [float(item["value"] if item[key] is None else item[key]) for item in found]
    return math.fsum(numbers) / len(numbers)
