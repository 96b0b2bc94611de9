"""The page of a study: what is real, every table with the mean over subjects and each of them, strips and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nd_dist.evaluation.points.layout import PICTURE, Layout, repeat_file
from nd_dist.evaluation.points.units import image_name
from nd_dist.evaluation.reconstruction.costs import duration
from nd_dist.files import write_text
from nd_dist.metrics.statistics.scores import Statistics
from nd_dist.metrics.table import Metric
from nd_dist.report.charts import Chart, guidance_map
from nd_dist.report.findings import Findings
from nd_dist.report.pictures import Case, PictureGrid, data_uri, picture_grids, spread
from nd_dist.report.study.files import csv_tables, latex_tables, markdown_tables, published_cells
from nd_dist.report.study.tables import (
    NOT_RUN,
    Runs,
    StudyRow,
    StudyTable,
    TableSource,
    Whose,
    departures,
    finished_runs,
    honesty,
    study_table,
)
from nd_dist.report.tables import MetricTable, PublishedRow, TableRow, difference_cells, point_cells
from nd_dist.report.templates import filled

NUM_STRIPS = 4
MAX_STRIP = 7  # pictures beside what was seen; a table with more rows is one over kappa and eta
SIDE = 96
NUM_MAPS = 4


@dataclass(frozen=True)
class TableView:
    """A table as the page shows it.

    Args:
        source: Its title and note.
        means: For each data set the means over subjects with differences.
        subjects: For each metric a table with a column for each subject.
        columns: Heads of these.
        published: Published rows beside it.
        strips: Pictures of the first subject and seed, one of each row.
        maps, grids: Heat maps and pictures over kappa and eta, where its rows span them.
    """

    source: TableSource
    means: list[MetricTable]
    subjects: list[tuple[Metric, list[TableRow]]]
    columns: list[str]
    published: list[PublishedRow]
    strips: list[Case]
    maps: list[Chart]
    grids: list[PictureGrid]


def write_study_report(
    out_dir: Path,
    title: str,
    sources: Sequence[TableSource],
    own_departures: Sequence[str],
    lacking: Sequence[str],
    took: Mapping[str, Sequence[float]],
) -> list[Path]:
    """Write ``report.html`` and ``tables.csv``, ``.md``, ``.tex`` of a study; return their paths.

    Args:
        out_dir: Folder of the study.
        title: Heading of the page.
        sources: The tables.
        own_departures: Where the study does otherwise than the published one.
        lacking: Stages that are not done, in words.
        took: What was done -> the seconds of each time, of subjects and seeds.

    Raises:
        DataError: see ``finished_runs``.
    """
    runs = Runs()
    found = finished_runs(sources, runs)
    firsts = {source: every[0] for source, every in found.items()}
    first = next(iter(firsts.values()))
    statistics = Statistics(int(first["provenance"]["bootstrap"]))
    tables = [study_table(source, runs, statistics) for source in sources]
    is_simulated = any(each.get("simulated") for each in firsts.values())
    page = filled(
        "study.html",
        title=title,
        simulated=is_simulated,
        honesty={source: honesty(each) for source, each in firsts.items()},
        tables=[_view(table, runs) for table in tables],
        lacking=lacking,
        took={name: (len(times), duration(fmean(times)), duration(sum(times))) for name, times in took.items()},
        departures=departures(found, own_departures),
        protocol=first["protocol"],
        details=first["protocol_details"],
    )
    texts = {
        "tables.csv": csv_tables(tables),
        "tables.md": markdown_tables(tables, is_simulated),
        "tables.tex": latex_tables(tables, is_simulated),
        "report.html": page,
    }
    for name, text in texts.items():
        write_text(out_dir / name, text)
    return [out_dir / name for name in texts]


def _view(table: StudyTable, runs: Runs) -> TableView:
    """Return a table as the page shows it."""
    columns, metrics = table.columns, list(table.metrics)
    means = []
    for mean in [whose for whose in columns if whose.is_mean]:
        every = [str(whose.subject) for whose in columns if whose.source == mean.source and not whose.is_mean]
        who = f"mean of subjects {', '.join(every)}" if len(every) > 1 else f"subject {every[0]}"
        lines = [line for row in table.rows for line in _mean_lines(table, row, mean)]
        means.append(MetricTable(f"{mean.source}: {who}", metrics, lines))
    subjects = []
    for metric in metrics:
        lines = [TableRow(row.label, [_cell(row, whose, metric) for whose in columns]) for row in table.rows]
        subjects.append((metric, lines))
    published = [
        PublishedRow(
            f"{item.method}, subject {item.subjects}", published_cells(table, item), item.protocol, item.source, False
        )
        for item in table.published
    ]
    maps = _maps(table)
    strips, grids = ([], _grids(table, runs)) if maps else (_strips(table, runs), [])
    heads = [whose.label for whose in columns]
    return TableView(table.source, means, subjects, heads, published, strips, maps, grids)


def _mean_lines(table: StudyTable, row: StudyRow, mean: Whose) -> list[TableRow]:
    """Return a row's mean over a data set, and below it the difference to the row that it is tested against."""
    metrics, kind = list(table.metrics), "main" if row.label == table.source.against else "point"
    lines = [TableRow(row.labelled(mean.source), [_cell(row, mean, metric) for metric in metrics], kind)]
    if differences := row.differences.get(mean.source):
        lines.append(TableRow(f"− {table.source.against}", difference_cells(metrics, differences), "difference"))
    return lines


def _cell(row: StudyRow, whose: Whose, metric: Metric) -> tuple[str, str, str]:
    """Return value, interval and no verdict, or that it was not run."""
    if whose not in row.scores:
        return (NOT_RUN, "", "")
    return point_cells(row.scores[whose].metrics, [metric])[0]


def _strips(table: StudyTable, runs: Runs) -> list[Case]:
    """Return pictures of the first subject and seed, spread evenly over its images: what was seen, one of each row."""
    place = next(iter(table.rows[0].source.places))
    shown = [row.source for row in table.rows if runs.entry(row.source, place)]
    if not shown or len(shown) > MAX_STRIP:
        return []
    folders = [row.places[place].folder for row in shown]
    metrics = [runs.metrics(folder) for folder in folders]
    ids = set.intersection(*(set(each["images"][str(place.subject)]) for each in metrics))
    originals = Layout(folders[0], metrics[0]["protocol"])
    made = {row.label: at / runs.entry(row, place)["folder"] for row, at in zip(shown, folders, strict=True)}
    return [
        Case(
            image_id,
            data_uri(originals.original_of(image_id) / PICTURE, SIDE),
            [(label, [data_uri(at / image_name(image_id) / repeat_file(0), SIDE)]) for label, at in made.items()],
        )
        for image_id in spread(sorted(ids), NUM_STRIPS)
    ]


def _maps(table: StudyTable) -> list[Chart]:
    """Return heat maps over kappa and eta of the means over the first data set, where rows span both."""
    mean = table.columns[0]
    guided = {row.source.point: row for row in table.rows if row.source.point.is_guided}
    kappas, etas = {point.kappa for point in guided}, {point.eta for point in guided}
    if min(len(kappas), len(etas)) < 2 or len(guided) < len(kappas) * len(etas):
        return []
    charts = []
    for metric in [each for each in table.metrics if each.kind in ("low-level", "high-level")][:NUM_MAPS]:
        items = {point: row.item(mean, metric) for point, row in guided.items()}
        if values := {point: float(item["value"]) for point, item in items.items() if item}:
            charts.append(guidance_map(metric, "", values, None))
    return charts


def _grids(table: StudyTable, runs: Runs) -> list[PictureGrid]:
    """Return pictures over kappa and eta of the first subject and seed."""
    row = next(row.source for row in table.rows if row.source.point.is_guided)
    folder = next(iter(row.places.values())).folder
    return picture_grids(Findings(folder)) if runs.metrics(folder) else []
