"""Tables that say whether a decoder generalises: in the report of a run, and over runs of several splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.metrics.generalisation import ALL, NEARER, SEEN_TO_TRAINED, TO_SEEN, TO_TRAINED, unpaired_difference
from nd_dist.metrics.statistics.scores import RESAMPLED
from nd_dist.metrics.table import Metric, metric_of
from nd_dist.report.findings import Findings, Row
from nd_dist.report.tables import MetricTable, TableRow

Item = Mapping[str, Any]  # Any: JSON
COLUMNS = (
    Metric(NEARER, "Nearer to the picture seen", "agreement", True, True, None, "than to any training picture."),
    Metric(TO_SEEN, "To the picture seen", "agreement", True, False, None, "Correlation of features."),
    Metric(TO_TRAINED, "To the nearest training picture", "agreement", False, False, None, "Correlation of features."),
    Metric(SEEN_TO_TRAINED, "Seen to nearest training", "agreement", True, False, None, "What a perfect one reaches."),
)
DIMENSIONS = (
    Metric("decoded", "Decoded dimension", "agreement", True, False, None, "Directions along which features vary."),
    Metric("true", "True dimension", "agreement", True, False, None, "The same of the pictures' own features."),
)


def generalisation_tables(findings: Findings) -> list[MetricTable]:
    """Return, of each subject, what is retrieved by points and controls and by groups, and how groups drop."""
    entries = [*findings.metrics.get("points", []), *findings.metrics.get("controls", [])]
    found = {(int(e["subject"]), Point.of(e)): e["generalisation"] for e in entries if "generalisation" in e}
    tables = []
    for subject in findings.subjects:
        whose = f"{findings.subject_label(subject)}: " if len(findings.subjects) > 1 else ""
        rows = [*findings.main_rows(subject), *findings.controls_of(subject)]
        rows = [row for row in rows if (subject, row.point) in found]
        guided = findings.guided(subject)
        main = next((row for row in rows if row is guided), rows[0] if rows else None)
        if main is None:
            continue
        of_main = found[subject, main.point]
        if "retrieval" in of_main:
            lines = [_row(row.label, found[subject, row.point], _kind(row, main)) for row in rows]
            tables.append(MetricTable(f"{whose}{ALL}", [*COLUMNS, *DIMENSIONS], lines))
            groups = [(name, items) for name, items in of_main["retrieval"].items() if name != ALL]
            lines = [TableRow(f"{name} ({items[NEARER]['n']})", _cells(COLUMNS, items)) for name, items in groups]
            tables.append(MetricTable(f"{whose}groups, {main.label}", list(COLUMNS), lines))
        pairs = [each for each in findings.shown_metrics if any(each.name in i for i in of_main["among_all"].values())]
        if pairs:
            columns = [replace(each, label=f"{each.label}, {which}") for each in pairs for which in ("own", "all")]
            lines = [
                TableRow(name, _beside(pairs, main.groups.get(name, {}), items))
                for name, items in of_main["among_all"].items()
            ]
            title = f"{whose}two-way identification among a group's own images and among all, {main.label}"
            tables.append(MetricTable(title, columns, lines))
        if of_main["drop"]:
            names = dict.fromkeys(name for items in of_main["drop"].values() for name in items)
            metrics = [each for each in findings.shown_metrics if each.name in names]
            lines = [TableRow(name, _changes(metrics, items)) for name, items in of_main["drop"].items()]
            tables.append(MetricTable(f"{whose}groups minus all other images, {main.label}", metrics, lines))
    return tables


def split_table(run_dirs: Sequence[Path]) -> MetricTable:
    """Return the recipe's point of several runs under each other, and how each differs from the first.

    The runs were trained and tested on other splits, so their images differ and intervals of differences are unpaired.

    Raises:
        DataError: a run has no metrics, or not of the first one's protocol or number of resamples.
    """
    findings = [Findings(run_dir) for run_dir in run_dirs]
    made = {(each.metrics["protocol"], each.metrics["provenance"].get("bootstrap")) for each in findings}
    if len(made) > 1:
        raise DataError(
            "Runs of different protocols, or with different numbers of resamples, do not compare.",
            where=", ".join(map(str, run_dirs)),
            found="; ".join(f"protocol {protocol}, {resamples} resamples" for protocol, resamples in sorted(made)),
            todo="evaluate them with one evaluation.protocol and evaluation.bootstrap",
        )
    metrics, lines = findings[0].shown_metrics, []
    shown = [(each, row) for each in findings for row in _main_rows(each)]
    for each, row in shown:
        split = each.config.get("data", {}).get("split", "")
        label = f"{split}, {each.subject_label(row.subject).lower()} ({each.run_dir.name}, {row.label})"
        lines.append(TableRow(label, _cells(metrics, row.metrics), "main"))
        first = next((pair for pair in shown if pair[1].subject == row.subject), (each, row))
        if first[1] is not row:
            lines.append(TableRow("− the first", _changes(metrics, _differences((each, row), first)), "difference"))
    return MetricTable(f"{findings[0].metrics['protocol']}: splits", metrics, lines)


def _main_rows(findings: Findings) -> list[Row]:
    """Return the main guided point of every subject, or the one without guidance."""
    rows = [findings.guided(subject) or findings.unguided(subject) for subject in findings.subjects]
    return [row for row in rows if row is not None]


def _differences(first: tuple[Findings, Row], second: tuple[Findings, Row]) -> dict[str, Item]:
    """Return metric -> difference of two rows of different runs, first minus second."""
    scores = []
    for findings, row in (first, second):
        layout = Layout(findings.run_dir, findings.metrics["protocol"])
        scores.append(read_scores(*layout.score_folders(row.shown, row.subject)))
    found: dict[str, Item] = {}
    for name in sorted(scores[0].metrics.keys() & scores[1].metrics.keys()):
        if all(RESAMPLED + name in each.arrays for each in scores):
            items = [each.metrics[name] for each in scores]
            arrays = [each.arrays[RESAMPLED + name] for each in scores]
            one, other = ((float(i["value"]), a, int(i["n"])) for i, a in zip(items, arrays, strict=True))
            value, low, high = unpaired_difference(one, other)
            found[name] = {"value": value, "ci_low": low, "ci_high": high}
    return found


def _kind(row: Row, main: Row) -> str:
    return "main" if row is main else "point" if row.point.is_plain else "control"


def _row(label: str, found: Item, kind: str) -> TableRow:
    items = dict(found.get("retrieval", {}).get(ALL, {}))
    sizes = found.get("dimension", {})
    cells = [(f"{sizes[each.name]:.1f}", "", "") if each.name in sizes else ("", "", "") for each in DIMENSIONS]
    return TableRow(label, [*_cells(COLUMNS, items), *cells], kind)


def _cells(metrics: Sequence[Metric], items: Mapping[str, Item]) -> list[tuple[str, str, str]]:
    """Return value and interval of each metric."""
    cells = []
    for metric in metrics:
        item = items.get(metric.name)
        cells.append((metric.text(item["value"]), _interval(metric.text, item), "") if item else ("", "", ""))
    return cells


def _beside(
    metrics: Sequence[Metric], own: Mapping[str, Item], among_all: Mapping[str, Item]
) -> list[tuple[str, str, str]]:
    """Return two cells of each metric: with distractors of the group, and with all."""
    return [cell for metric in metrics for items in (own, among_all) for cell in _cells([metric], items)]


def _changes(metrics: Sequence[Metric], items: Mapping[str, Item]) -> list[tuple[str, str, str]]:
    """Return difference and interval of each metric, coloured where the interval leaves zero out."""
    cells = []
    for metric in metrics:
        item = items.get(metric.name)
        if item is None:
            cells.append(("", "", ""))
            continue
        is_clear = item["ci_low"] is not None and not item["ci_low"] <= 0 <= item["ci_high"]
        is_better = (item["value"] > 0) == metric_of(metric.name, metric.higher_is_better).higher_is_better
        verdict = ("better" if is_better else "worse") if is_clear else "unclear"
        cells.append((metric.change(item["value"]), _interval(metric.change, item), verdict))
    return cells


def _interval(text: Any, item: Item) -> str:
    return "" if item["ci_low"] is None else f"{text(item['ci_low'])} to {text(item['ci_high'])}"
