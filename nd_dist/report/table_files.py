"""The metric table as CSV, Markdown and LaTeX, beside the page. Pure text; what it looks like stands in ``page/``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from nd_dist.metrics.table import Metric
from nd_dist.report.findings import Findings, Row
from nd_dist.report.tables import group_title
from nd_dist.report.templates import filled

# LaTeX takes braces and percent signs for its own, so its template has other marks than the page's
LATEX_MARKS = {
    "block_start_string": "((*", "block_end_string": "*))",
    "variable_start_string": "(((", "variable_end_string": ")))",
    "comment_start_string": "((=", "comment_end_string": "=))",
}  # fmt: skip
_LATEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "κ": r"$\kappa$", "η": r"$\eta$", "−": r"$-$",
    "\u00a0": "~",
}  # fmt: skip


def csv_table(findings: Findings) -> str:
    """Return one line per subject, point, group of images and metric, with full precision; controls last."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            "subject", "kappa", "eta", "settings", "control", "images", "metric", "value", "ci_low", "ci_high", "n",
            "higher_is_better", "protocol",
        ]
    )  # fmt: skip
    for row in [*findings.rows, *findings.controls]:
        settings = " ".join(f"{key}={value}" for key, value in row.point.settings)
        control = "" if row.point.control == "none" else row.point.control
        place = [row.whose, row.point.kappa, row.point.eta, settings, control]
        for images, metrics in {"all": row.metrics, **row.groups}.items():
            for metric in findings.shown_metrics:
                if item := metrics.get(metric.name):
                    numbers = [item["value"], item["ci_low"], item["ci_high"], item["n"], item["higher_is_better"]]
                    writer.writerow([*place, images, metric.name, *numbers, findings.metrics["protocol"]])
    return stream.getvalue()


def markdown_table(findings: Findings) -> str:
    """Return the paper's layout: one line per point, one column per metric, intervals in brackets."""
    return _markdown(findings, [*findings.rows, *findings.controls])


def main_table(findings: Findings) -> str:
    """Return ``markdown_table`` without the points of a sweep: no guidance, guidance, and the controls."""
    rows = []
    for subject in findings.blocks:
        rows += [*findings.main_rows(subject), *findings.controls_of(subject)]
    return _markdown(findings, rows)


def _markdown(findings: Findings, rows: Sequence[Row]) -> str:
    """Return the table of all images, then one of every named group."""
    groups = []
    for name in findings.group_names:
        grouped = [(row, row.groups[name]) for row in rows if name in row.groups]
        shown = [metric for metric in findings.shown_metrics if any(metric.name in found for _, found in grouped)]
        groups.append((group_title(name, [found for _, found in grouped]), grouped, shown))
    return filled(
        "metrics.md",
        note=_note(findings),
        protocol=findings.metrics["protocol"],
        lines=[(row, row.metrics) for row in rows],
        metrics=findings.shown_metrics,
        groups=groups,
    )


def _note(findings: Findings) -> str:
    return "Simulated data (phantom NSD). " if findings.metrics.get("simulated") else ""


def latex_table(findings: Findings) -> str:
    """Return a ``table*`` for papers (packages booktabs and graphicx): the main rows and controls, best points bold.

    A value is bold where it is the best of its column among the points of its subject (controls and ceiling are not
    points); the interval stands small below it.
    """
    return filled(
        "metrics.tex",
        LATEX_MARKS,
        {"tex": latex_text},
        note=_note(findings),
        protocol=findings.metrics["protocol"],
        metrics=findings.shown_metrics,
        blocks=[
            (findings.subject_label(subject), findings.main_rows(subject), findings.controls_of(subject))
            for subject in findings.blocks
        ],
        counts=sorted({len(findings.image_ids(subject)) for subject in findings.subjects}),
        is_best=_is_best,
    )


def _is_best(row: Row, metric: Metric, rivals: Sequence[Row]) -> bool:
    values = [rival.metrics[metric.name]["value"] for rival in rivals if metric.name in rival.metrics]
    best = (max if metric.higher_is_better else min)(values, default=None)
    return len(values) > 1 and row.metrics[metric.name]["value"] == best


def latex_text(text: str) -> str:
    """Return text with everything escaped that LaTeX would take for a command."""
    return "".join(_LATEX.get(character, character) for character in text)
