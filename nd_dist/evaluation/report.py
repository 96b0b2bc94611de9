"""The report of a run: one HTML page that needs nothing but itself, and the table as CSV and Markdown beside it.

Reads the run folder only. What is shown is decided here, how it looks in ``report.html.j2``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nd_dist.evaluation.charts import Cell, curve, heat_map
from nd_dist.evaluation.findings import Findings, Row
from nd_dist.evaluation.tables import csv_table, markdown_table, metrics_shown
from nd_dist.evaluation.thumbnails import data_uri
from nd_dist.files import write_text
from nd_dist.metrics.table import Metric, metric_of

TEMPLATE = "report.html.j2"
MAX_PICTURE_ROWS = 12
MAX_REPEATS = 5
NUM_EXTREMES = 4
HEADLINE = ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim")
HEAT_MAPS = ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim")


def write_report(run_dir: Path) -> Path:
    """Write ``report.html``, ``metrics.csv`` and ``metrics.md`` of a run; return the page's path.

    Args:
        run_dir: Folder of a run that has been evaluated.

    Raises:
        DataError: there are no metrics yet, or a picture is missing.
    """
    findings = Findings(run_dir)
    page = render(findings)
    write_text(run_dir / "metrics.csv", csv_table(findings))
    write_text(run_dir / "metrics.md", markdown_table(findings))
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render(findings: Findings) -> str:
    """Return the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("nd_dist.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    metrics = findings.metrics
    return environment.from_string(source).render(
        simulated=bool(metrics.get("simulated")),
        remark=metrics["provenance"].get("networks", {}).get("remark", ""),
        split=metrics.get("split", "test"),
        num_images={subject: len(findings.image_ids(subject)) for subject in findings.subjects},
        subjects=findings.subjects,
        tiles=headline_tiles(findings),
        sentences=headline_sentences(findings),
        metrics=metrics_shown(findings),
        tables=[metric_table(findings, subject) for subject in findings.subjects],
        galleries=[gallery(findings, subject) for subject in findings.subjects],
        extremes=[extremes(findings, subject) for subject in findings.subjects],
        heat_maps=heat_maps(findings),
        curves=loss_curves(findings),
        protocol=metrics["protocol"],
        protocol_facts=protocol_facts(metrics.get("protocol_details", {})),
        departures=metrics.get("departures", []),
        provenance=provenance_facts(metrics["provenance"]),
        config=json.dumps(metrics["provenance"].get("config", {}), indent=1, sort_keys=True),
    )


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
    """Return better, worse or unclear: unclear where the interval of the difference holds zero."""
    if difference["ci_low"] <= 0 <= difference["ci_high"]:
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
        low, high = metric.change(change["ci_low"]), metric.change(change["ci_high"])
        sentences.append(
            f"Subject {subject}: guidance at {guided.label} {kind} from {before} to {after} (difference "
            f"{metric.change(change['value'])}, 95\u00a0% {low} to {high}, p {probability(change['p'])}, "
            f"{change['n']} images)."
        )
    return sentences


def probability(p: float) -> str:
    """Return a p value with its relation sign."""
    return "< .001" if p < 0.001 else f"= {p:.3f}".replace("0.", ".")


@dataclass(frozen=True)
class TableRow:
    """One line of a metric table: a point, or a difference between points."""

    label: str
    cells: list[tuple[str, str, str]]
    is_difference: bool = False
    is_main: bool = False


@dataclass(frozen=True)
class MetricTable:
    """The table of one subject: the rows that matter, and all of them where there are more."""

    subject: int
    rows: list[TableRow]
    others: list[TableRow]


def metric_table(findings: Findings, subject: int) -> MetricTable:
    """Return a subject's table: without guidance, with, the paired difference; other points apart."""
    metrics = metrics_shown(findings)
    guided, unguided = findings.guided(subject), findings.unguided(subject)
    main = [row for row in (unguided, guided) if row is not None]
    rows = [_point_row(row, metrics, is_main=row is guided) for row in main]
    if guided is not None and (differences := findings.differences(guided)):
        cells = []
        for metric in metrics:
            found = differences.get(metric.name)
            cells.append(
                (metric.change(found["value"]), f"p {probability(found['p'])}", verdict(metric, found))
                if found
                else ("", "", "")
            )
        rows.append(TableRow("difference", cells, is_difference=True))
    others = [_point_row(row, metrics) for row in findings.rows_of(subject) if row not in main]
    return MetricTable(subject, rows, others)


def _point_row(row: Row, metrics: list[Metric], is_main: bool = False) -> TableRow:
    cells = []
    for metric in metrics:
        item = row.metrics.get(metric.name)
        interval = f"{metric.text(item['ci_low'])} – {metric.text(item['ci_high'])}" if item else ""
        cells.append((metric.text(item["value"]), interval, "") if item else ("–", "", ""))
    return TableRow(row.label, cells, is_main=is_main)


@dataclass(frozen=True)
class PictureRow:
    """One image: what was seen, and its reconstructions."""

    image_id: int
    original: str
    unguided: list[str]
    guided: list[str]
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Picture rows of one subject."""

    subject: int
    unguided_label: str
    guided_label: str
    rows: list[PictureRow]
    num_images: int = 0


def gallery(findings: Findings, subject: int) -> Gallery:
    """Return images spread evenly over all of a subject's (not chosen by quality), all repeats of each."""
    ids = findings.image_ids(subject)
    most = max(4, MAX_PICTURE_ROWS // len(findings.subjects))
    count = min(most, len(ids))
    chosen = [ids[position * len(ids) // count] for position in range(count)]
    return _gallery(findings, subject, dict.fromkeys(chosen, ""), MAX_REPEATS)


def extremes(findings: Findings, subject: int) -> tuple[Gallery, Gallery] | None:
    """Return the best and the worst images of a subject by PixCorr; None where there are too few to tell apart."""
    shown = findings.guided(subject) or findings.unguided(subject)
    values = findings.values(shown, "pixcorr") if shown else {}
    if len(values) < 2 * NUM_EXTREMES:
        return None
    ranked = sorted(values, key=lambda image_id: (-values[image_id], image_id))
    metric = metric_of("pixcorr")
    notes = {image_id: f"PixCorr {metric.text(values[image_id])}" for image_id in ranked}
    best = {image_id: notes[image_id] for image_id in ranked[:NUM_EXTREMES]}
    worst = {image_id: notes[image_id] for image_id in ranked[: -NUM_EXTREMES - 1 : -1]}
    return _gallery(findings, subject, best, 1), _gallery(findings, subject, worst, 1)


def _gallery(findings: Findings, subject: int, notes: dict[int, str], max_repeats: int) -> Gallery:
    guided, unguided = findings.guided(subject), findings.unguided(subject)

    def pictures(row: Row | None, image_id: int) -> list[str]:
        return [data_uri(path) for path in findings.repeats(row, image_id)[:max_repeats]] if row else []

    rows = [
        PictureRow(
            image_id,
            data_uri(findings.original(image_id)),
            pictures(unguided, image_id),
            pictures(guided, image_id),
            note,
        )
        for image_id, note in notes.items()
    ]
    return Gallery(
        subject,
        unguided.label if unguided else "",
        guided.label if guided else "",
        rows,
        len(findings.image_ids(subject)),
    )


@dataclass(frozen=True)
class HeatMap:
    """One metric over the grid of a subject."""

    subject: int
    metric: Metric
    svg: Markup


def heat_maps(findings: Findings) -> list[HeatMap]:
    """Return kappa x eta maps of the headline metrics, for subjects with more than one guided point."""
    maps = []
    for subject in findings.subjects:
        rows = [row for row in findings.rows_of(subject) if row.point.is_guided]
        if len(rows) < 2:
            continue
        kappas = sorted({row.point.kappa for row in rows}, reverse=True)
        etas = sorted({row.point.eta for row in rows})
        for name in HEAT_MAPS:
            if not all(name in row.metrics for row in rows):
                continue
            metric = metric_of(name)
            best = max(row.metrics[name]["value"] for row in rows)
            cells = {
                (kappas.index(row.point.kappa), etas.index(row.point.eta)): Cell(
                    row.metrics[name]["value"],
                    metric.text(row.metrics[name]["value"]),
                    row.metrics[name]["value"] == best,
                )
                for row in rows
            }
            title = f"{metric.label} over kappa and eta, subject {subject}"
            svg = heat_map(title, [f"κ {kappa:g}" for kappa in kappas], [f"η {eta:g}" for eta in etas], cells)
            maps.append(HeatMap(subject, metric, Markup(svg)))
    return maps


def loss_curves(findings: Findings) -> list[tuple[str, Markup]]:
    """Return the training loss of every stage that the run's events know."""
    names = {1: "Stage 1: all other subjects", 2: "Stage 2: the target subject"}
    return [
        (names.get(stage, f"Stage {stage}"), Markup(curve(f"Loss of stage {stage}", steps, losses)))
        for stage, (steps, losses) in findings.losses().items()
        if len(steps) > 1
    ]


def protocol_facts(details: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the protocol in words."""
    if not details:
        return []

    def resize(item: dict[str, Any]) -> str:
        if item["size"] is None:
            return "as it is"
        smooth = ", antialiased" if item["antialias"] or item["backend"] == "pil" else ", no antialias"
        return f"{item['size']} px, {item['filter']}, {item['backend']}{smooth}"

    recon = resize(details["recon_pixels"]) if details["recon_pixels"]["size"] else "the original's size"
    return [
        ("Source", details["source"]),
        (
            "First resize",
            f"reconstruction {resize(details['recon_first'])}; original {resize(details['original_first'])}",
        ),
        ("PixCorr and SSIM at", f"reconstruction {recon}; original {resize(details['original_pixels'])}"),
        ("SSIM", {"2d": "two-dimensional", "columns": "column-wise (scikit-image up to 0.19)"}[details["ssim"]]),
        (
            "Two-way distractors",
            {"real": "other originals", "reconstruction": "other reconstructions"}[details["distractors"]],
        ),
        ("Repeats", details["repeats"].replace("_", " ")),
        ("Intervals", "95 %, percentile bootstrap over images; differences are paired"),
    ]


def provenance_facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return provenance as lines: code, seed, hashes, versions, and how to repeat it."""
    decoding = provenance.get("decoding", {})
    facts = [
        ("Repeat with", "nd evaluate config.yaml (in this run's folder)"),
        ("Code", provenance.get("code", "unknown")),
        ("Seed", provenance.get("seed", "unknown")),
        ("Config hash", provenance.get("config_hash", "unknown")),
        ("Shards", provenance.get("shards", "unknown")),
        (
            "Targets",
            f"{decoding.get('embeddings', 'unknown')}; z calibration: {decoding.get('z_calibration', 'none')}",
        ),
        ("Decoder", decoding.get("decoder", "none")),
        *(
            (f"Network: {name}", value)
            for name, value in provenance.get("networks", {}).items()
            if name != "scheduler"
        ),
        *((f"Judge: {name}", value) for name, value in provenance.get("judges", {}).items()),
        ("Platform", provenance.get("platform", "unknown")),
        ("Versions", ", ".join(f"{name} {value}" for name, value in provenance.get("versions", {}).items())),
    ]
    return [(name, str(value)) for name, value in facts]
