"""The tables of a study as CSV, Markdown and LaTeX. Pure text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS
from nd_dist.metrics.published import PUBLISHED, Published
from nd_dist.metrics.table import Metric
from nd_dist.report.study import NOT_RUN, StudyRow, StudyTable
from nd_dist.report.table_files import latex_text
from nd_dist.report.tables import probability

SIMULATED = "Simulated data (phantom NSD). "
_HEAD = (
    "table", "row", "subject", "metric", "value", "ci_low", "ci_high", "n", "higher_is_better", "against",
    "difference", "difference_ci_low", "difference_ci_high", "p", "source",
)  # fmt: skip


def published_rows(table: StudyTable) -> list[Published]:
    """Return the published rows that stand beside a table."""
    return [item for item in PUBLISHED if item.method in table.source.published]


def subjects_of(table: StudyTable) -> list[int]:
    """Return the mean over subjects, then each of them."""
    return [ALL_SUBJECTS, *dict.fromkeys(subject for row in table.rows for subject, _ in row.source.folders)]


def who(subject: int) -> str:
    """Return a subject, or the mean over all, as a word."""
    return "mean" if subject == ALL_SUBJECTS else str(subject)


def published_cells(table: StudyTable, item: Published) -> list[str]:
    """Return a published row's numbers under a table's columns."""
    values = ((metric, item.values.get(metric.name)) for metric in table.metrics)
    return ["–" if value is None else metric.number(value) for metric, value in values]


def csv_tables(tables: list[StudyTable]) -> str:
    """Return a line for each table, row, subject and metric, with full precision; what was not run says so."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _HEAD, lineterminator="\n", restval="")
    writer.writeheader()
    for table in tables:
        for line in _csv_lines(table):
            writer.writerow({"table": table.source.title, **line})
    return stream.getvalue()


def _csv_lines(table: StudyTable) -> Iterator[dict[str, Any]]:
    """Yield what a table's lines hold."""
    for row in table.rows:
        for subject in subjects_of(table):
            place = {"row": row.label, "subject": who(subject)}
            if subject not in row.scores:
                yield {**place, "value": NOT_RUN}
                continue
            for metric in table.metrics:
                if item := row.scores[subject].metrics.get(metric.name):
                    kept = {name: item[name] for name in ("value", "ci_low", "ci_high", "n", "higher_is_better")}
                    yield {**place, "metric": metric.name, **kept, **_csv_difference(table, row, subject, metric)}
    for published in published_rows(table):
        own: dict[str, Any] = {"row": published.method, "subject": published.subjects}
        source = f"{published.source}; protocol {published.protocol}"
        for name, value in published.values.items():
            yield {**own, "metric": name, "value": value, "source": source}


def _csv_difference(table: StudyTable, row: StudyRow, subject: int, metric: Metric) -> dict[str, Any]:
    if subject != ALL_SUBJECTS or metric.name not in row.differences:
        return {}
    item = row.differences[metric.name]
    ends = {"difference_ci_low": item["ci_low"], "difference_ci_high": item["ci_high"]}
    return {"against": table.source.against, "difference": item["value"], **ends, "p": item["p"]}


def markdown_tables(tables: list[StudyTable], is_simulated: bool) -> str:
    """Return every table as Markdown: means over subjects with differences, published rows, then each subject."""
    lines = [f"{SIMULATED if is_simulated else ''}95 % intervals over images in brackets."]
    for table in tables:
        lines += ["", f"## {table.source.title}", *(["", table.source.note] if table.source.note else []), ""]
        heads = [f"{metric.label}{metric.unit_suffix} {metric.arrow}" for metric in table.metrics]
        lines += [f"| | subject | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
        for subject in subjects_of(table):
            for row in table.rows:
                lines.append(f"| {row.label} | {who(subject)} | {' | '.join(_values(table, row, subject))} |")
                if subject == ALL_SUBJECTS and row.differences:
                    changes = [change_text(metric, row.differences.get(metric.name)) for metric in table.metrics]
                    lines.append(f"| − {table.source.against} | mean | {' | '.join(changes)} |")
            for item in published_rows(table) if subject == ALL_SUBJECTS else ():
                label = f"published: {item.method} ({item.source}; protocol: {item.protocol})"
                lines.append(f"| {label} | {item.subjects} | {' | '.join(published_cells(table, item))} |")
    return "\n".join(lines) + "\n"


def _values(table: StudyTable, row: StudyRow, subject: int) -> list[str]:
    """Return the cells of a row."""
    if subject not in row.scores:
        return [NOT_RUN for _ in table.metrics]
    return [value_text(metric, row.scores[subject].metrics.get(metric.name)) for metric in table.metrics]


def value_text(metric: Metric, item: Mapping[str, Any] | None) -> str:
    """Return a value with its interval."""
    if item is None:
        return "–"
    ends = "" if item["ci_low"] is None else f" [{metric.number(item['ci_low'])}, {metric.number(item['ci_high'])}]"
    return metric.number(item["value"]) + ends


def change_text(metric: Metric, item: Mapping[str, Any] | None) -> str:
    """Return a difference with its interval and corrected p value."""
    if item is None:
        return ""
    ends = "" if item["ci_low"] is None else f" [{metric.change(item['ci_low'])}, {metric.change(item['ci_high'])}]"
    return metric.change(item["value"]) + ends + ("" if item["p"] is None else f", p {probability(item['p'])}")


def latex_tables(tables: list[StudyTable], is_simulated: bool) -> str:
    """Return a ``table*`` for each table: means over subjects, the interval small below each value."""
    lines = ["% needs \\usepackage{booktabs} and \\usepackage{graphicx}"]
    for table in tables:
        titles = ((f"{metric.label}{metric.unit_suffix}", metric) for metric in table.metrics)
        heads = " & ".join(latex_text(title) + _arrow(metric) for title, metric in titles)
        lines += [r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%"]
        lines += [rf"\begin{{tabular}}{{l{'c' * len(table.metrics)}}}", r"\toprule", rf" & {heads} \\", r"\midrule"]
        for row in table.rows:
            lines.append(rf"{latex_text(row.label)} & {' & '.join(_latex_cells(table, row))} \\")
        if rows := published_rows(table):
            lines.append(r"\midrule")
            for item in rows:
                label = latex_text(f"{item.method} ({item.source}; protocol {item.protocol})")
                lines.append(rf"{label} & {' & '.join(map(latex_text, published_cells(table, item)))} \\")
        whose = ", ".join(map(who, subjects_of(table)[1:]))
        caption = latex_text(f"{table.source.title}. {SIMULATED if is_simulated else ''}Means over subjects {whose}; ")
        caption += r"95\,\% intervals over images."
        lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table*}", ""]
    return "\n".join(lines)


def _arrow(metric: Metric) -> str:
    return r" $\uparrow$" if metric.higher_is_better else r" $\downarrow$"


def _latex_cells(table: StudyTable, row: StudyRow) -> list[str]:
    """Return the cells of a row's mean over subjects."""
    found = row.scores.get(ALL_SUBJECTS)
    if found is None:
        return [NOT_RUN for _ in table.metrics]
    return [_latex_cell(metric, found.metrics.get(metric.name)) for metric in table.metrics]


def _latex_cell(metric: Metric, item: Mapping[str, Any] | None) -> str:
    if item is None:
        return "--"
    value = latex_text(metric.number(item["value"]))
    if item["ci_low"] is None:
        return value
    low, high = (latex_text(metric.number(item[end])) for end in ("ci_low", "ci_high"))
    return rf"\shortstack{{{value}\\ {{\tiny {low}--{high}}}}}"
