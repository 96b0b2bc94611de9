"""Charts of the report's page: heat maps over kappa and eta, on test and on training images, and training losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from nd_dist.evaluation.points.units import Point
from nd_dist.metrics.table import Metric, metric_of
from nd_dist.report.findings import Findings
from nd_dist.report.svg import Cell, curve, heat_map

HEAT_MAPS = ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim")


@dataclass(frozen=True)
class HeatMap:
    """One metric over the grid of a subject (0: of all subjects)."""

    subject: int
    metric: Metric
    svg: Markup


def heat_maps(findings: Findings) -> list[HeatMap]:
    """Return kappa x eta maps of the headline metrics on test images, for subjects with more than one guided point."""
    maps = []
    for subject in findings.subjects:
        rows = [row for row in findings.rows_of(subject) if row.point.is_guided and not row.point.settings]
        for name in HEAT_MAPS:
            if len(rows) > 1 and all(name in row.metrics for row in rows):
                values = {row.point: float(row.metrics[name]["value"]) for row in rows}
                title = f"{metric_of(name).label} over kappa and eta, subject {subject}"
                maps.append(_map(title, subject, metric_of(name), values, findings.chosen))
    return maps


def selection_map(findings: Findings) -> HeatMap | None:
    """Return the map on training images from which a point was chosen, None where none was."""
    selection = findings.selection
    candidates = {Point.of(item): float(item["value"]) for item in selection.get("candidates", [])}
    guided = {point: value for point, value in candidates.items() if point.is_guided and not point.settings}
    if len(guided) < 2:
        return None
    metric = metric_of(selection["metric"], bool(selection["higher_is_better"]))
    return _map(f"{metric.label} on training images", 0, metric, guided, findings.chosen)


def _map(title: str, subject: int, metric: Metric, values: Mapping[Point, float], chosen: Point | None) -> HeatMap:
    kappas = sorted({point.kappa for point in values}, reverse=True)
    etas = sorted({point.eta for point in values})
    best = (max if metric.higher_is_better else min)(values.values())
    cells = {
        (kappas.index(point.kappa), etas.index(point.eta)): Cell(
            value if metric.higher_is_better else -value,
            metric.text(value) + (" *" if point == chosen else ""),
            value == best,
        )
        for point, value in values.items()
    }
    svg = heat_map(title, [f"κ {kappa:g}" for kappa in kappas], [f"η {eta:g}" for eta in etas], cells)
    return HeatMap(subject, metric, Markup(svg))


def loss_curves(findings: Findings) -> list[tuple[str, Markup]]:
    """Return the training loss of every stage that the run's events know."""
    names = {1: "Stage 1: all other subjects", 2: "Stage 2: the target subject"}
    return [
        (names.get(stage, f"Stage {stage}"), Markup(curve(f"Loss of stage {stage}", steps, losses)))
        for stage, (steps, losses) in findings.losses().items()
        if len(steps) > 1
    ]
