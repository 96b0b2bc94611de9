"""The report of a run: one HTML page that needs nothing but itself; the table as CSV, Markdown and LaTeX beside it.

Reads the run folder only. What is shown is decided in the ``report_*`` files, how it looks in ``page/``.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from nd_dist.files import write_text
from nd_dist.report.charts import heat_maps, loss_curves, selection_map
from nd_dist.report.facts import (
    absent_lines,
    protocol_facts,
    provenance_facts,
    selection_sentence,
)
from nd_dist.report.findings import Findings
from nd_dist.report.pictures import extremes, gallery, picture_grids
from nd_dist.report.table_files import csv_table, latex_table, markdown_table, metrics_shown
from nd_dist.report.tables import (
    group_tables,
    headline_sentences,
    headline_tiles,
    metric_table,
    published_table,
)

PAGE, STYLE = "report.html.j2", "style.css.j2"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``metrics.csv``, ``.md`` and ``.tex`` of a run; return the page's path.

    Args:
        run_dir: Folder of a run that has been evaluated.

    Raises:
        DataError: there are no metrics yet, or a picture is missing.
    """
    findings = Findings(run_dir)
    page = render(findings)
    write_text(run_dir / "metrics.csv", csv_table(findings))
    write_text(run_dir / "metrics.md", markdown_table(findings))
    write_text(run_dir / "metrics.tex", latex_table(findings))
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def render(findings: Findings) -> str:
    """Return the page."""
    folder = resources.files("nd_dist.report").joinpath("page")
    texts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in (PAGE, STYLE)}
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    metrics, subjects = findings.metrics, findings.subjects
    return environment.get_template(PAGE).render(
        simulated=bool(metrics.get("simulated")),
        remark=metrics["provenance"].get("networks", {}).get("remark", ""),
        split=metrics.get("split", "test"),
        num_images={subject: len(findings.image_ids(subject)) for subject in subjects},
        subjects=subjects,
        tiles=headline_tiles(findings),
        sentences=headline_sentences(findings),
        selection=selection_sentence(findings),
        metrics=metrics_shown(findings),
        tables=[metric_table(findings, subject) for subject in subjects],
        groups=group_tables(findings),
        published=published_table(findings),
        galleries=[gallery(findings, subject) for subject in subjects],
        grids=[grid for subject in subjects for grid in picture_grids(findings, subject)],
        extremes=[pair for subject in subjects for pair in extremes(findings, subject)],
        selection_map=selection_map(findings),
        heat_maps=heat_maps(findings),
        curves=loss_curves(findings),
        protocol=metrics["protocol"],
        protocol_facts=protocol_facts(metrics.get("protocol_details", {})),
        departures=metrics.get("departures", []),
        absent=absent_lines(findings),
        provenance=provenance_facts(metrics["provenance"]),
        config=json.dumps(metrics["provenance"].get("config", {}), indent=1, sort_keys=True),
    )
