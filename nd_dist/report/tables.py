"""Numbers of the report's page as text: headline tiles and sentences, metric tables, published rows, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from nd_dist.evaluation.points.units import CONTROLS
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, RECIPE
from nd_dist.metrics.published import FOUR_SUBJECTS, PUBLISHED
from nd_dist.metrics.table import METRICS, Metric, metric_of, ordered
from nd_dist.report.findings import Findings, Row, point_label
from nd_dist.report.svg import scale

NUM_TILES = 8
OF_SETS = ("lpips", "fid", "kid")  # not among the field's eight columns
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Tile:
    """One headline number: with guidance, without, and where both lie between chance and ceiling."""

    metric: Metric
    value: str
    before: str
    change: str
    verdict: str
    scale: Markup
    ends: str


def headline_metrics(findings: Findings) -> list[Metric]:
    """Return the field's metrics, as far as the run has them: never agreement, which grows whatever is decoded."""
    kinds = ("low-level", "high-level")
    return [each for each in findings.shown_metrics if each.kind in kinds and each.name not in OF_SETS][:NUM_TILES]


def headline_tiles(findings: Findings) -> list[Tile]:
    """Return the headline numbers of all subjects together, or of the only one."""
    subject = findings.blocks[0]
    guided, unguided = findings.guided(subject), findings.unguided(subject)
    shown = guided or unguided
    if shown is None:
        return []
    tiles = []
    for metric in headline_metrics(findings):
        if metric.name in shown.metrics:
            values = [row.metrics[metric.name]["value"] for row in (unguided, guided) if row is not None]
            found = findings.differences(shown).get(metric.name)
            tiles.append(
                Tile(
                    metric,
                    metric.text(values[-1]),
                    metric.text(values[0]) if len(values) > 1 else "",
                    metric.change(found["value"]) if found else "",
                    verdict(metric, found) if found else "",
                    *_scale(findings, subject, metric, values),
                )
            )
    return tiles


def _scale(findings: Findings, subject: int, metric: Metric, values: Sequence[float]) -> tuple[Markup, str]:
    """Return a drawn scale from chance to ceiling, and its ends in words; empty where chance is not known."""
    controls = {row.point.control: row.metrics.get(metric.name, {}) for row in findings.controls_of(subject)}
    chance = controls.get("shuffled", {}).get("value", metric.chance)
    ceiling = controls.get("ceiling", {}).get("value", 1.0 if metric.higher_is_better else 0.0)
    if chance is None or chance == ceiling:
        return Markup(), ""
    best = "ceiling" if controls.get("ceiling") else "best"
    ends = f"chance {metric.text(chance)}, {best} {metric.text(ceiling)}"
    places = [(value - chance) / (ceiling - chance) for value in values]
    return Markup(scale(f"{metric.label}: {ends}", places)), ends


def verdict(metric: Metric, difference: Mapping[str, Any]) -> str:
    """Return better, worse or unclear: unclear where the difference is not significant (corrected p above .05).

    Agreement of repeats is never called better: shuffled inputs have it too.
    """
    if metric.kind == "agreement" or difference["p"] is None or difference["p"] > SIGNIFICANT:
        return "unclear"
    return "better" if (difference["value"] > 0) == metric.higher_is_better else "worse"


def headline_sentences(findings: Findings) -> list[str]:
    """Return one sentence per subject on what guidance changed in PixCorr, with its interval."""
    sentences = []
    metric = metric_of("pixcorr")
    for subject in findings.blocks:
        guided, unguided = findings.guided(subject), findings.unguided(subject)
        if guided is None or unguided is None or "pixcorr" not in (differences := findings.differences(guided)):
            continue
        change = differences["pixcorr"]
        kind = {
            "better": "raises PixCorr",
            "worse": "lowers PixCorr",
            "unclear": "does not clearly change PixCorr:",
        }[verdict(metric, change)]
        before, after = (metric.text(row.metrics["pixcorr"]["value"]) for row in (unguided, guided))
        ends = [metric.change(change[end]) for end in ("ci_low", "ci_high") if change[end] is not None]
        interval = f", 95\u00a0% {' to '.join(ends)}" if ends else ""
        sentences.append(
            f"{findings.subject_label(subject)}: guidance at {guided.label} {kind} from {before} to {after} "
            f"(difference {metric.change(change['value'])}{interval}, p {probability(change['p'])}, "
            f"{change['n']} images)."
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
    """A table: its title, its columns, the rows that matter, and all others where there are more."""

    title: str
    metrics: list[Metric]
    rows: list[TableRow]
    others: list[TableRow] = field(default_factory=list)


def metric_tables(findings: Findings) -> list[MetricTable]:
    """Return a table of all subjects together and of each.

    Its rows are without guidance, with, the paired difference, controls; other points stand apart.
    """
    metrics, tables = findings.shown_metrics, []
    for subject in findings.blocks:
        main, guided = findings.main_rows(subject), findings.guided(subject)
        rows = [_point_row(row, metrics, "main" if row is guided else "point") for row in main]
        if guided is not None and (differences := findings.differences(guided)):
            rows.append(TableRow("difference", difference_cells(metrics, differences), "difference"))
        rows += [_point_row(row, metrics, "control") for row in findings.controls_of(subject)]
        others = []
        for row in findings.rows_of(subject):
            if row not in main:
                others.append(_point_row(row, metrics, "point"))
                if differences := findings.differences(row, RECIPE):
                    cells = difference_cells(metrics, differences)
                    others.append(TableRow("− the recipe's point", cells, "difference"))
        tables.append(MetricTable(findings.subject_label(subject), metrics, rows, others))
    return tables


def group_tables(findings: Findings) -> list[MetricTable]:
    """Return a table of the main rows and controls for every named group of images and subject."""
    tables = []
    for subject in findings.blocks:
        guided = findings.guided(subject)
        shown = [(row, "main" if row is guided else "point") for row in findings.main_rows(subject)]
        shown += [(row, "control") for row in findings.controls_of(subject)]
        for name in findings.group_names:
            grouped = [(replace(row, metrics=row.groups[name]), kind) for row, kind in shown if name in row.groups]
            if grouped:
                metrics = [each for each in findings.shown_metrics if any(each.name in r.metrics for r, _ in grouped)]
                whose = f"{findings.subject_label(subject)}: " if len(findings.blocks) > 1 else ""
                title = whose + group_title(name, [row.metrics for row, _ in grouped])
                tables.append(MetricTable(title, metrics, [_point_row(row, metrics, kind) for row, kind in grouped]))
    return tables


def group_title(name: str, found: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Return a group's name with its number of images."""
    count = max(item["n"] for metrics in found for item in metrics.values())
    return f"{name} ({count} image{'s' if count > 1 else ''})"


def beside_table(first: Findings, second: Findings) -> MetricTable:
    """Return the main rows of two runs, all subjects together, under each other."""
    names = {metric.name for metric in second.shown_metrics}
    metrics = [metric for metric in first.shown_metrics if metric.name in names]
    rows = []
    for findings in (first, second):
        for row in findings.main_rows(findings.blocks[0]):
            labelled = replace(row, label=f"{findings.run_dir.name}, {row.label}")
            rows.append(_point_row(labelled, metrics, "main" if findings is first else "point"))
    protocols = {findings.metrics["protocol"] for findings in (first, second)}
    note = "" if len(protocols) == 1 else f" (not comparable: protocols {', '.join(sorted(protocols))})"
    return MetricTable(f"{first.run_dir.name} beside {second.run_dir.name}{note}", metrics, rows)


def difference_cells(
    metrics: list[Metric], differences: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Return the cells of a paired difference: value, p value, verdict."""
    cells = []
    for metric in metrics:
        found = differences.get(metric.name)
        small = f"p {probability(found['p'])}" if found and found["p"] is not None else ""
        cells.append((metric.change(found["value"]), small, verdict(metric, found)) if found else ("", "", ""))
    return cells


def _point_row(row: Row, metrics: list[Metric], kind: str) -> TableRow:
    return TableRow(row.label, point_cells(row.metrics, metrics), kind)


def point_cells(found: Mapping[str, Mapping[str, Any]], metrics: list[Metric]) -> list[tuple[str, str, str]]:
    """Return the cells of a point: value, interval, no verdict."""
    items = ((metric, found.get(metric.name)) for metric in metrics)
    return [(m.number(item["value"]), _interval(m, item), "") if item else ("–", "", "") for m, item in items]


def _interval(metric: Metric, item: Mapping[str, Any]) -> str:
    """Return the small print of a value: its interval, its range over seeds, chance where the candidates decide it."""
    words = [] if item["ci_low"] is None else [f"{metric.number(item['ci_low'])} – {metric.number(item['ci_high'])}"]
    words += ["seeds " + " – ".join(map(metric.number, item["seeds"]))] if "seeds" in item else []
    words += [f"chance {metric.number(item['chance'])}"] if "chance" in item else []
    return ", ".join(words)


@dataclass(frozen=True)
class PublishedRow:
    """One published row, or one of ours among them."""

    method: str
    cells: list[str]
    protocol: str
    source: str
    is_ours: bool


def published_table(findings: Findings) -> tuple[list[Metric], list[PublishedRow]]:
    """Return the field's columns, and published numbers with the main points of this run on top."""
    metrics = [metric_of(name) for name in ordered({name for row in PUBLISHED for name in row.values})]
    subject, rows = findings.blocks[0], []
    whose = ", mean over subjects" if subject == ALL_SUBJECTS else ""
    for row in findings.main_rows(subject):
        values = {name: item["value"] for name, item in row.metrics.items()}
        cells = _cells(metrics, values)
        rows.append(PublishedRow(f"this run{whose}, {row.label}", cells, findings.metrics["protocol"], "", True))
    for item in PUBLISHED:
        method = item.method + ("" if item.subjects == FOUR_SUBJECTS else f", subject {item.subjects}")
        note = f"; {item.note}" if item.note else ""
        rows.append(PublishedRow(method, _cells(metrics, item.values), item.protocol + note, item.source, False))
    return metrics, rows


def _cells(metrics: list[Metric], values: Any) -> list[str]:
    return [metric.number(values[metric.name]) if metric.name in values else "–" for metric in metrics]


def selection_sentence(findings: Findings) -> str:
    """Return how the main point was chosen; empty where none was."""
    selection = findings.selection
    if not selection:
        return ""
    metric = metric_of(selection["metric"], bool(selection["higher_is_better"]))
    num_images = sum(len(ids) for ids in selection["images"].values())
    trained_on = "held out from training" if selection["heldout"] else "which training has seen"
    rule = {"best": "the best", "least_guidance": "the least guidance within the interval of the best"}
    return (
        f"The point {point_label(findings.chosen or findings.recipe)} was chosen on {num_images} training images, "
        f"{trained_on}, by {rule[selection['rule']]} {metric.label} of {len(selection['candidates'])} points "
        f"({metric.text(selection['chosen']['value'])} there); test images had no part in it."
    )


def cost_facts(findings: Findings) -> list[tuple[str, str]]:
    """Return what the run's ranks worked, as they said when they were done; empty where none did."""
    phases: dict[str, float] = {}
    launches, hosts, devices = set(), set(), set()
    for rank in findings.work():
        launches.add(rank["launch"])
        hosts.add(rank["host"])
        devices.add(rank.get("device", "device unknown"))
        for phase, work in rank["work"].items():
            phases[phase] = phases.get(phase, 0.0) + float(work["busy_s"])
    if not sum(phases.values()):
        return []
    made = sum(
        len(findings.repeats(row, findings.image_ids(row.subject)[0])) * len(findings.image_ids(row.subject))
        for row in (*findings.rows, *findings.controls)
        if row.shown == row.point and row.subject in findings.subjects
    )
    each = f"; {phases.get('reconstruct', 0.0) / made:.2g} s a picture made and judged" if made else ""
    hours = f"{sum(phases.values()) / 3600:.3g} device-hours, {len(launches)} launch(es), {len(hosts)} host(s){each}"
    parts = [f"{name} {seconds:,.0f} s" for name, seconds in phases.items() if seconds >= 0.5]
    return [("Cost", hours), ("Hardware", ", ".join(sorted(devices))), ("By phase", ", ".join(parts))]


def absent_lines(findings: Findings) -> list[str]:
    """Return one line per metric or control that is missing, with the reason."""
    lines = []
    for name, reason in findings.metrics.get("absent", {}).items():
        control = name.removeprefix("control ")
        label = CONTROLS.get(control, METRICS[name].label if name in METRICS else name)
        lines.append(f"{label}: {reason}")
    return lines
