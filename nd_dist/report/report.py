"""The report of a run: one HTML page that needs nothing but itself; beside it a page of all images, and the tables.

Reads the run folder only. What is shown is decided in the files beside this one, how it looks in ``page/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nd_dist.files import write_text
from nd_dist.report.charts import image_scatters, selection_map, sweep_charts, training_curves
from nd_dist.report.findings import Findings
from nd_dist.report.generalisation import generalisation_tables
from nd_dist.report.pictures import all_images, extremes, galleries, picture_grids
from nd_dist.report.table_files import csv_table, latex_table, markdown_table
from nd_dist.report.tables import (
    absent_lines,
    beside_table,
    cost_facts,
    group_tables,
    headline_sentences,
    headline_tiles,
    metric_tables,
    published_table,
    selection_sentence,
)
from nd_dist.report.templates import filled

IMAGES = "images.html"


def write_report(run_dir: Path, beside: Path | None = None, partial: dict[str, Any] | None = None) -> Path:
    """Write ``report.html``, ``images.html``, ``metrics.csv``, ``.md`` and ``.tex`` of a run; return the page's path.

    Args:
        run_dir: Folder of a run that has been evaluated.
        beside: Another run, whose main rows stand beside this one's.
        partial: What is known so far of a run that goes on: the page is then ``report.partial.html``, without tables.

    Raises:
        DataError: there are no metrics yet, or a picture is missing.
    """
    findings = Findings(run_dir, partial)
    name = "report.partial.html" if partial else "report.html"
    page = render(findings, Findings(beside) if beside else None)
    if not partial:
        write_text(run_dir / "metrics.csv", csv_table(findings))
        write_text(run_dir / "metrics.md", markdown_table(findings))
        write_text(run_dir / "metrics.tex", latex_table(findings))
        write_text(run_dir / IMAGES, filled(IMAGES, galleries=all_images(findings), run=run_dir.name))
    write_text(run_dir / name, page)
    return run_dir / name


def render(findings: Findings, beside: Findings | None = None) -> str:
    """Return the page."""
    metrics = findings.metrics
    return filled(
        "report.html",
        simulated=bool(metrics.get("simulated")),
        is_nsd=findings.is_given or findings.config.get("data", {}).get("reader", "nsd") in ("nsd", "mindeye2"),
        is_given=findings.is_given,
        partial=metrics.get("partial", ""),
        remark=metrics["provenance"].get("networks", {}).get("remark", ""),
        split=metrics.get("split", "test"),
        counts=[(findings.subject_label(each), len(findings.image_ids(each))) for each in findings.subjects],
        tiles=headline_tiles(findings),
        tiles_of=findings.subject_label(findings.blocks[0]) if len(findings.blocks) > 1 else "",
        sentences=headline_sentences(findings),
        selection=selection_sentence(findings),
        metrics=findings.shown_metrics,
        tables=metric_tables(findings),
        has_controls=bool(findings.controls),
        groups=group_tables(findings),
        generalisation=generalisation_tables(findings),
        published=published_table(findings),
        beside=[beside_table(findings, beside)] if beside else [],
        galleries=galleries(findings),
        images=IMAGES,
        grids=picture_grids(findings),
        extremes=extremes(findings),
        selection_map=selection_map(findings),
        charts=sweep_charts(findings),
        scatters=image_scatters(findings),
        curves=training_curves(findings),
        protocol=metrics["protocol"],
        details=metrics.get("protocol_details", {}),
        departures=metrics.get("departures", []),
        absent=absent_lines(findings),
        cost=[] if metrics.get("partial") else cost_facts(findings),
        provenance=metrics["provenance"],
        config=json.dumps(metrics["provenance"].get("config", {}), indent=1, sort_keys=True),
    )
