"""The metric table as CSV and Markdown, beside the page. Pure text."""

from __future__ import annotations

import csv
import io

from nd_dist.evaluation.findings import Findings
from nd_dist.metrics.table import Metric, metric_of


def metrics_shown(findings: Findings) -> list[Metric]:
    """Return the metrics of a run in the paper's order."""
    directions = {name: bool(item["higher_is_better"]) for row in findings.rows for name, item in row.metrics.items()}
    return [metric_of(name, directions[name]) for name in findings.metric_names]


def csv_table(findings: Findings) -> str:
    """Return one line per subject, point and metric, with full precision."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["subject", "kappa", "eta", "metric", "value", "ci_low", "ci_high", "n", "higher_is_better", "protocol"]
    )
    for row in findings.rows:
        for metric in metrics_shown(findings):
            if item := row.metrics.get(metric.name):
                numbers = [item["value"], item["ci_low"], item["ci_high"], item["n"], item["higher_is_better"]]
                place = [row.subject, row.point.kappa, row.point.eta]
                writer.writerow([*place, metric.name, *numbers, findings.metrics["protocol"]])
    return stream.getvalue()


def markdown_table(findings: Findings) -> str:
    """Return the paper's layout: one line per point, one column per metric, intervals in brackets."""
    metrics = metrics_shown(findings)
    note = "Simulated data (phantom NSD). " if findings.metrics.get("simulated") else ""
    header = ["subject", "guidance", *(f"{metric.label} {metric.arrow}" for metric in metrics)]
    lines = [
        f"{note}Protocol `{findings.metrics['protocol']}`; 95 % intervals over images in brackets.",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
    ]
    for row in findings.rows:
        cells = []
        for metric in metrics:
            item = row.metrics.get(metric.name)
            interval = f"[{metric.text(item['ci_low'])}, {metric.text(item['ci_high'])}]" if item else ""
            cells.append(f"{metric.text(item['value'])} {interval}" if item else "")
        lines.append(f"| {row.subject} | {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
