"""Numbers of the report's page as text: headline tiles and sentences, the metric table, published rows beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nd_dist.evaluation.scoring.comparisons import RECIPE
from nd_dist.metrics.published import FOUR_SUBJECTS, PUBLISHED
from nd_dist.metrics.table import Metric, metric_of, ordered
from nd_dist.report.findings import Findings, Row
from nd_dist.report.table_files import metrics_shown

HEADLINE = ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim")


@dataclass(frozen=True)
class Tile:
    """One headline number: with guidance, and without."""

    metric: Metric
    guided: str
    unguided: str
    change: str
    verdict: str


def headline_tiles(findings: Findings) -> list[Tile]:
    """Return the first subject's headline numbers with and without guidance."""
    subject = findings.subjects[0]
    guided, unguided = findings.guided(subject), findings.unguided(subject)
    shown = guided or unguided
    tiles = []
    for name in HEADLINE:
        if shown is None or name not in shown.metrics:
            continue
        metric = metric_of(name)
        difference = findings.differences(shown).get(name)
        tiles.append(
            Tile(
                metric=metric,
                guided=metric.text(shown.metrics[name]["value"]),
                unguided=metric.text(unguided.metrics[name]["value"]) if guided and unguided else "",
                change=metric.change(difference["value"]) if difference else "",
                verdict=verdict(metric, difference) if difference else "",
            )
        )
    return tiles


def verdict(metric: Metric, difference: dict[str, Any]) -> str:
    """Return better, worse or unclear: unclear where the difference is not significant (corrected p above .05)."""
    if difference["p"] is None or difference["p"] > 0.05:
        return "unclear"
    return "better" if (difference["value"] > 0) == metric.higher_is_better else "worse"


def headline_sentences(findings: Findings) -> list[str]:
    """Return one sentence per subject on what guidance changed in PixCorr, with its interval."""
    sentences = []
    for subject in findings.subjects:
        guided, unguided = findings.guided(subject), findings.unguided(subject)
        if guided is None or unguided is None or "pixcorr" not in (differences := findings.differences(guided)):
            continue
        metric, change = metric_of("pixcorr"), differences["pixcorr"]
        kind = {
            "better": "raises PixCorr",
            "worse": "lowers PixCorr",
            "unclear": "does not clearly change PixCorr:",
        }[verdict(metric, change)]
        before, after = (metric.text(row.metrics["pixcorr"]["value"]) for row in (unguided, guided))
        ends = [metric.change(change[end]) for end in ("ci_low", "ci_high") if change[end] is not None]
        interval = f", 95\u00a0% {' to '.join(ends)}" if ends else ""
        sentences.append(
            f"Subject {subject}: guidance at {guided.label} {kind} from {before} to {after} (difference "
            f"{metric.change(change['value'])}{interval}, "
            f"p {probability(change['p'])}, {change['n']} images)."
        )
    return sentences


def probability(p: float) -> str:
    """Return a p value with its relation sign."""
    return "< .001" if p < 0.001 else f"= {p:.3f}".replace("0.", ".")


@dataclass(frozen=True)
class TableRow:
    """One line of a metric table: a point, a control, or a difference between points.

    Args:
        label: First column.
        cells: (value, small print, verdict) of each metric.
        kind: ``point``, ``main``, ``difference`` or ``control``.
    """

    label: str
    cells: list[tuple[str, str, str]]
    kind: str = "point"


@dataclass(frozen=True)
class MetricTable:
    """The table of one subject: the rows that matter, and all of them where there are more."""

    subject: int
    rows: list[TableRow]
    others: list[TableRow]


def metric_table(findings: Findings, subject: int) -> MetricTable:
    """Return a subject's table: without guidance, with, the paired difference, controls; other points apart."""
    metrics, main, guided = metrics_shown(findings), findings.main_rows(subject), findings.guided(subject)
    rows = [_point_row(row, metrics, "main" if row is guided else "point") for row in main]
    if guided is not None and (differences := findings.differences(guided)):
        rows.append(TableRow("difference", _difference_cells(metrics, differences), "difference"))
    rows += [_point_row(row, metrics, "control") for row in findings.controls_of(subject)]
    others = []
    for row in findings.rows_of(subject):
        if row not in main:
            others.append(_point_row(row, metrics, "point"))
            if differences := findings.differences(row, RECIPE):
                others.append(TableRow("− the recipe's point", _difference_cells(metrics, differences), "difference"))
    return MetricTable(subject, rows, others)


@dataclass(frozen=True)
class GroupTable:
    """The main rows and controls of one subject for one named group of images."""

    subject: int
    name: str
    num_images: int
    metrics: list[Metric]
    rows: list[TableRow]


def group_tables(findings: Findings) -> list[GroupTable]:
    """Return a table of every named group of images and subject."""
    tables = []
    for subject in findings.subjects:
        guided = findings.guided(subject)
        shown = [(row, "main" if row is guided else "point") for row in findings.main_rows(subject)]
        shown += [(row, "control") for row in findings.controls_of(subject)]
        for name in findings.group_names:
            grouped = [(replace(row, metrics=row.groups[name]), kind) for row, kind in shown if name in row.groups]
            if not grouped:
                continue
            metrics = [item for item in metrics_shown(findings) if any(item.name in row.metrics for row, _ in grouped)]
            count = max(item["n"] for row, _ in grouped for item in row.metrics.values())
            rows = [_point_row(row, metrics, kind) for row, kind in grouped]
            tables.append(GroupTable(subject, name, count, metrics, rows))
    return tables


def _difference_cells(metrics: list[Metric], differences: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    cells = []
    for metric in metrics:
        found = differences.get(metric.name)
        small = f"p {probability(found['p'])}" if found and found["p"] is not None else ""
        cells.append((metric.change(found["value"]), small, verdict(metric, found)) if found else ("", "", ""))
    return cells


def _point_row(row: Row, metrics: list[Metric], kind: str) -> TableRow:
    cells = []
    for metric in metrics:
        item = row.metrics.get(metric.name)
        cells.append((metric.number(item["value"]), _interval(metric, item), "") if item else ("–", "", ""))
    return TableRow(row.label, cells, kind)


def _interval(metric: Metric, item: dict[str, Any]) -> str:
    """Return the small print of a value; empty where it has no interval."""
    if item["ci_low"] is None:
        return ""
    return f"{metric.number(item['ci_low'])} – {metric.number(item['ci_high'])}"


@dataclass(frozen=True)
class PublishedRow:
    """One published row, or one of ours among them."""

    method: str
    cells: list[str]
    protocol: str
    source: str
    is_ours: bool
    is_first_hand: bool


@dataclass(frozen=True)
class PublishedTable:
    """Published numbers in the field's columns, ours on top."""

    metrics: list[Metric]
    rows: list[PublishedRow]


def published_table(findings: Findings) -> PublishedTable:
    """Return published numbers beside the main points of this run, where they share columns."""
    names = ordered({name for row in PUBLISHED for name in row.values})
    metrics = [metric_of(name) for name in names]
    rows = []
    for subject in findings.subjects:
        for row in findings.main_rows(subject):
            values = {name: row.metrics[name]["value"] for name in names if name in row.metrics}
            title = f"this run{f', subject {subject}' if len(findings.subjects) > 1 else ''}, {row.label}"
            rows.append(PublishedRow(title, _cells(metrics, values), findings.metrics["protocol"], "", True, True))
    for item in PUBLISHED:
        method = item.method + ("" if item.subjects == FOUR_SUBJECTS else f", subject {item.subjects}")
        cells = _cells(metrics, item.values)
        rows.append(PublishedRow(method, cells, item.protocol, item.source, False, item.is_first_hand))
    return PublishedTable(metrics, rows)


def _cells(metrics: list[Metric], values: Any) -> list[str]:
    return [metric.number(values[metric.name]) if metric.name in values else "–" for metric in metrics]
