"""The metric table as CSV, Markdown and LaTeX, beside the page. Pure text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS
from nd_dist.metrics.table import Metric
from nd_dist.report.findings import Findings, Row

Found = Mapping[str, Mapping[str, Any]]  # metric name -> value, interval, n


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
        place = [_subject(row), row.point.kappa, row.point.eta, settings, control]
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
    metrics = findings.shown_metrics
    lines = [
        f"{_note(findings)}Protocol `{findings.metrics['protocol']}`; 95 % intervals over images in brackets.",
        "",
    ]
    lines += _markdown_lines([(row, row.metrics) for row in rows], metrics)
    for name in findings.group_names:
        grouped = [(row, row.groups[name]) for row in rows if name in row.groups]
        own = [metric for metric in metrics if any(metric.name in found for _, found in grouped)]
        count = max(item["n"] for _, found in grouped for item in found.values())
        lines += ["", f"Only {name} ({count} image{'s' if count > 1 else ''}):", "", *_markdown_lines(grouped, own)]
    return "\n".join(lines) + "\n"


def _markdown_lines(rows: Sequence[tuple[Row, Found]], metrics: Sequence[Metric]) -> list[str]:
    """Return the lines of one table."""
    header = ["subject", "guidance", *(f"{metric.label} {metric.arrow}" for metric in metrics)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row, found in rows:
        cells = [_with_interval(found.get(metric.name), metric) for metric in metrics]
        lines.append(f"| {_subject(row)} | {row.label} | {' | '.join(cells)} |")
    return lines


def _subject(row: Row) -> str:
    return "mean" if row.subject == ALL_SUBJECTS else str(row.subject)


def _note(findings: Findings) -> str:
    return "Simulated data (phantom NSD). " if findings.metrics.get("simulated") else ""


def _with_interval(item: Mapping[str, Any] | None, metric: Metric) -> str:
    if item is None:
        return ""
    value = metric.text(item["value"])
    if item["ci_low"] is None:
        return value
    return f"{value} [{metric.text(item['ci_low'])}, {metric.text(item['ci_high'])}]"


def latex_table(findings: Findings) -> str:
    """Return a ``table*`` for papers (packages booktabs and graphicx): the main rows and controls, best points bold.

    A value is bold where it is the best of its column among the points of its subject (controls and ceiling are not
    points); the interval stands small below it.
    """
    metrics = findings.shown_metrics
    arrows = {True: r"$\uparrow$", False: r"$\downarrow$"}
    heads = " & ".join(
        f"{latex_text(metric.label + metric.unit_suffix)} {arrows[metric.higher_is_better]}" for metric in metrics
    )
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        r"\begin{table*}",
        r"\centering",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'c' * len(metrics)}}}",
        r"\toprule",
        rf" & {heads} \\",
    ]
    for subject in findings.blocks:
        main = findings.main_rows(subject)
        lines += [
            r"\midrule",
            rf"\multicolumn{{{len(metrics) + 1}}}{{l}}{{{latex_text(findings.subject_label(subject))}}} \\",
        ]
        lines += [_latex_row(row, metrics, main) for row in main]
        lines += [_latex_row(row, metrics, ()) for row in findings.controls_of(subject)]
    ids = sorted({len(findings.image_ids(subject)) for subject in findings.subjects})
    caption = (
        f"{_note(findings)}Protocol {findings.metrics['protocol']}, {'/'.join(map(str, ids))} test images; "
        r"95\,\% bootstrap intervals over images below each value."
    )
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table*}"]
    return "\n".join(lines) + "\n"


def _latex_row(row: Row, metrics: Sequence[Metric], rivals: Sequence[Row]) -> str:
    cells = []
    for metric in metrics:
        item = row.metrics.get(metric.name)
        if item is None:
            cells.append("--")
            continue
        value = latex_text(metric.number(item["value"]))
        value = rf"\textbf{{{value}}}" if _is_best(row, metric, rivals) else value
        if item["ci_low"] is not None:
            low, high = (latex_text(metric.number(item[end])) for end in ("ci_low", "ci_high"))
            value = rf"\shortstack{{{value}\\ {{\tiny {low}--{high}}}}}"
        cells.append(value)
    return rf"{latex_text(row.label)} & {' & '.join(cells)} \\"


def _is_best(row: Row, metric: Metric, rivals: Sequence[Row]) -> bool:
    values = [rival.metrics[metric.name]["value"] for rival in rivals if metric.name in rival.metrics]
    best = (max if metric.higher_is_better else min)(values, default=None)
    return len(values) > 1 and row.metrics[metric.name]["value"] == best


_LATEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "κ": r"$\kappa$", "η": r"$\eta$", "−": r"$-$",
    "\u00a0": "~",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Return text with everything escaped that LaTeX would take for a command."""
    return "".join(_LATEX.get(character, character) for character in text)
