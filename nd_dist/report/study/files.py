"""The tables of a study as CSV, Markdown and LaTeX. Pure text; what the last two look like stands in ``page/``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from nd_dist.metrics.published import Published
from nd_dist.metrics.table import Metric
from nd_dist.report.study.tables import NOT_RUN, StudyRow, StudyTable, Whose
from nd_dist.report.table_files import LATEX_MARKS, latex_text
from nd_dist.report.tables import probability
from nd_dist.report.templates import filled

_HEAD = (
    "table", "row", "data", "subject", "metric", "value", "ci_low", "ci_high", "seeds_low", "seeds_high", "n",
    "higher_is_better", "against", "difference", "difference_ci_low", "difference_ci_high", "p", "source",
)  # fmt: skip


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
        for whose in table.columns:
            place = {"row": row.label, "data": whose.source, "subject": "mean" if whose.is_mean else whose.subject}
            if whose not in row.scores:
                yield {**place, "value": NOT_RUN}
            for metric in table.metrics:
                if item := row.item(whose, metric):
                    kept = {name: item[name] for name in ("value", "ci_low", "ci_high", "n", "higher_is_better")}
                    seeds = dict(zip(("seeds_low", "seeds_high"), item.get("seeds", ()), strict=False))
                    yield {
                        **place,
                        "metric": metric.name,
                        **kept,
                        **seeds,
                        **_csv_difference(table, row, whose, metric),
                    }
    for published in table.published:
        own: dict[str, Any] = {"row": published.method, "data": "NSD", "subject": published.subjects}
        source = f"{published.source}; protocol {published.protocol}"
        for name, value in published.values.items():
            yield {**own, "metric": name, "value": value, "source": source}


def _csv_difference(table: StudyTable, row: StudyRow, whose: Whose, metric: Metric) -> dict[str, Any]:
    item = row.differences.get(whose.source, {}).get(metric.name) if whose.is_mean else None
    if item is None:
        return {}
    ends = {"difference_ci_low": item["ci_low"], "difference_ci_high": item["ci_high"]}
    return {"against": table.source.against, "difference": item["value"], **ends, "p": item["p"]}


def markdown_tables(tables: list[StudyTable], is_simulated: bool) -> str:
    """Return every table as Markdown: means over subjects with differences, published rows, then each subject."""
    return filled(
        "study.md", tables=tables, simulated=is_simulated, value=value_text, change=change_text, cells=published_cells
    )


def latex_tables(tables: list[StudyTable], is_simulated: bool) -> str:
    """Return a ``table*`` for each table: means over subjects, the interval small below each value."""
    tex = {"tex": latex_text}
    return filled(
        "study.tex", LATEX_MARKS, tex, tables=tables, simulated=is_simulated, not_run=NOT_RUN, cells=published_cells
    )


def published_cells(table: StudyTable, item: Published) -> list[str]:
    """Return a published row's numbers under a table's columns."""
    values = ((metric, item.values.get(metric.name)) for metric in table.metrics)
    return ["–" if value is None else metric.number(value) for metric, value in values]


def value_text(row: StudyRow, whose: Whose, metric: Metric) -> str:
    """Return a value with its interval and its range over seeds; a dash where the run has no such metric."""
    if whose not in row.scores:
        return NOT_RUN
    if (item := row.item(whose, metric)) is None:
        return "–"
    seeds = f", seeds {' to '.join(map(metric.number, item['seeds']))}" if "seeds" in item else ""
    return f"{metric.number(item['value'])}{_interval(item, metric.number)}{seeds}"


def change_text(metric: Metric, item: Mapping[str, Any] | None) -> str:
    """Return a difference with its interval and corrected p value."""
    if item is None:
        return ""
    p = "" if item["p"] is None else f", p {probability(item['p'])}"
    return f"{metric.change(item['value'])}{_interval(item, metric.change)}{p}"


def _interval(item: Mapping[str, Any], text: Any) -> str:
    return "" if item["ci_low"] is None else f" [{text(item['ci_low'])}, {text(item['ci_high'])}]"
