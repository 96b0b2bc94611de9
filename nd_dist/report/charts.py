"""Charts of the report's page: heat maps over kappa and eta, every other axis of a sweep, single images, training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from nd_dist.evaluation.points.units import Point
from nd_dist.metrics.table import Metric, metric_of
from nd_dist.report.findings import Findings, Row
from nd_dist.report.svg import Cell, axis_chart, curve, heat_map, scatter
from nd_dist.report.tables import headline_metrics

NUM_METRICS = 4
KAPPA, ETA = "κ", "η"


@dataclass(frozen=True)
class Chart:
    """A chart and what stands above it."""

    name: str
    svg: Markup


def sweep_charts(findings: Findings) -> list[Chart]:
    """Return, of all subjects together, heat maps over kappa and eta and a chart of every other axis that was swept.

    An axis is followed from the main point: everything else stays as it is there. Seeds are averaged.
    """
    subject = findings.blocks[0]
    main = findings.guided(subject)
    if main is None:
        return []
    has_means = any(row.point.is_seed_mean for row in findings.rows_of(subject))
    rows = [
        row for row in findings.rows_of(subject) if row.point.is_guided and (row.point.is_seed_mean or not has_means)
    ]
    places = {row.point: _place(findings, row) for row in rows}
    names = list(dict.fromkeys(name for place in places.values() for name in place))
    swept = [name for name in names if len({place.get(name) for place in places.values()}) > 1]
    whose = f", {findings.subject_label(subject).lower()}" if len(findings.blocks) > 1 else ""
    charts = []
    for metric in headline_metrics(findings)[:NUM_METRICS]:
        known = [row for row in rows if metric.name in row.metrics]
        if {KAPPA, ETA} <= set(swept):
            chosen = [row for row in known if _agree(places[row.point], places[main.point], (KAPPA, ETA))]
            values = {row.point: float(row.metrics[metric.name]["value"]) for row in chosen}
            charts.append(_map(metric, whose, values, findings.chosen))
        for axis in swept:
            if axis in (KAPPA, ETA) and {KAPPA, ETA} <= set(swept):
                continue
            along = [row for row in known if _agree(places[row.point], places[main.point], (axis,))]
            along.sort(key=lambda row: (str(type(places[row.point][axis])), places[row.point][axis]))
            if len(along) > 1:
                labels = [_text(places[row.point][axis]) for row in along]
                bars = [_bar(row.metrics[metric.name]) for row in along]
                title = f"{metric.label} over {axis}"
                charts.append(Chart(f"{title} {metric.arrow}{whose}", Markup(axis_chart(title, labels, bars))))
    return charts


def _place(findings: Findings, row: Row) -> dict[str, Any]:
    """Return where a point lies on every axis that any point has a value of."""
    point = row.point.without_seed
    found: dict[str, Any] = {KAPPA: point.kappa, ETA: point.eta}
    for key in sorted({key for row in findings.rows for key, _ in row.point.without_seed.settings}):
        section, _, name = key.rpartition(".")
        config = findings.config.get(section, {}) if section else findings.config
        found[key] = dict(point.settings).get(key, config.get(name, ""))
    return found


def _agree(first: Mapping[str, Any], second: Mapping[str, Any], but: tuple[str, ...]) -> bool:
    return all(first.get(name) == second.get(name) for name in {*first, *second} - set(but))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)[:12]


def _bar(item: Mapping[str, Any]) -> tuple[float, float, float]:
    value = float(item["value"])
    return (value, value, value) if item["ci_low"] is None else (value, float(item["ci_low"]), float(item["ci_high"]))


def selection_map(findings: Findings) -> Chart | None:
    """Return the map on training images from which a point was chosen, None where none was."""
    selection = findings.selection
    candidates = {Point.of(item): float(item["value"]) for item in selection.get("candidates", [])}
    guided = {point: value for point, value in candidates.items() if point.is_guided and not point.settings}
    if len(guided) < 2:
        return None
    metric = metric_of(selection["metric"], bool(selection["higher_is_better"]))
    return _map(metric, " on training images, where the point is chosen", guided, findings.chosen)


def _map(metric: Metric, whose: str, values: Mapping[Point, float], chosen: Point | None) -> Chart:
    kappas = sorted({point.kappa for point in values}, reverse=True)
    etas = sorted({point.eta for point in values})
    best = (max if metric.higher_is_better else min)(values.values())
    cells = {
        (kappas.index(point.kappa), etas.index(point.eta)): Cell(
            value if metric.higher_is_better else -value,
            metric.text(value) + (" *" if point.without_seed == chosen else ""),
            value == best,
        )
        for point, value in values.items()
    }
    title = f"{metric.label} over {KAPPA} and {ETA}"
    svg = heat_map(title, [f"{KAPPA} {kappa:g}" for kappa in kappas], [f"{ETA} {eta:g}" for eta in etas], cells)
    return Chart(f"{metric.label} {metric.arrow}{whose}", Markup(svg))


def image_scatters(findings: Findings) -> list[Chart]:
    """Return PixCorr and the last two-way metric of the first subject's images, with against without guidance."""
    subject = findings.subjects[0]
    guided, unguided = findings.guided(subject), findings.unguided(subject)
    if guided is None or unguided is None:
        return []
    metrics = headline_metrics(findings)
    two_way = [metric for metric in metrics if metric.chance == 0.5]
    charts = []
    for metric in [metric for metric in metrics if metric.name == "pixcorr"] + two_way[-1:]:
        before, after = (findings.values(row, metric.name) for row in (unguided, guided))
        pairs = [(before[image_id], after[image_id]) for image_id in before if image_id in after]
        if len(pairs) > 1:
            up = sum(second > first for first, second in pairs)
            name = f"{metric.label} of each image, subject {subject}: larger with guidance for {up} of {len(pairs)}"
            svg = scatter(name, pairs, ("without guidance", "with"))
            charts.append(Chart(name, Markup(svg)))
    return charts


def training_curves(findings: Findings) -> list[Chart]:
    """Return the loss of every stage, and what validations measured, as far as the run's events know."""
    names = {1: "Stage 1 (all other subjects)", 2: "Stage 2 (the target subject)"}
    kinds = [
        ("loss", findings.losses()),
        ("validation loss", findings.validations("loss")),
        ("validation, kind of thing in decoded captions", findings.validations("kind")),
        ("validation, image retrieval, top 1", findings.validations("top1_image_given_voxels")),
        ("validation, brain retrieval, top 1", findings.validations("top1_voxels_given_image")),
    ]
    charts = []
    for kind, stages in kinds:
        for stage, (steps, values) in stages.items():
            if len(steps) > 1 and all(map(math.isfinite, values)):
                name = f"{names.get(stage, f'Stage {stage}')}: {kind}"
                charts.append(Chart(name, Markup(curve(name, steps, values))))
    return charts
