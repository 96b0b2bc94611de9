"""The page of a study: what is real, every table with the mean over subjects and each of them, strips and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nd_dist.evaluation.points.layout import PICTURE, repeat_file
from nd_dist.evaluation.points.units import ORIGINAL, image_name
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS
from nd_dist.files import write_text
from nd_dist.metrics.table import Metric
from nd_dist.report.charts import Chart, guidance_map
from nd_dist.report.findings import Findings
from nd_dist.report.pictures import Case, PictureGrid, data_uri, picture_grids, spread
from nd_dist.report.study import (
    NOT_RUN,
    Place,
    RowSource,
    Runs,
    StudyRow,
    StudyTable,
    TableSource,
    departures,
    honesty,
    study_tables,
)
from nd_dist.report.study_files import (
    csv_tables,
    latex_tables,
    markdown_tables,
    published_cells,
    published_rows,
    subjects_of,
    who,
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
        title, note: Above it.
        mean: Means over subjects with differences.
        subjects: A table for each subject.
        published: Published rows beside it.
        strips: Pictures of the first subject and seed, one of each row.
        maps, grids: Heat maps and pictures over kappa and eta, where its rows span them.
    """

    title: str
    note: str
    mean: MetricTable
    subjects: list[MetricTable]
    published: list[PublishedRow]
    strips: list[Case]
    maps: list[Chart]
    grids: list[PictureGrid]


def write_study_report(
    out_dir: Path, title: str, sources: Sequence[TableSource], own_departures: Sequence[str], lacking: Sequence[str]
) -> list[Path]:
    """Write ``report.html`` and ``tables.csv``, ``.md``, ``.tex`` of a study; return their paths.

    Args:
        out_dir: Folder of the study.
        title: Heading of the page.
        sources: The tables.
        own_departures: Where the study does otherwise than the published one.
        lacking: Stages that are not done, in words.

    Raises:
        DataError: see ``study_tables``.
    """
    runs = Runs()
    tables = study_tables(sources, runs)
    first = runs.finished[0]
    is_simulated = bool(first.get("simulated"))
    page = filled(
        "study.html",
        title=title,
        simulated=is_simulated,
        honesty=honesty(runs),
        tables=[_view(table, runs) for table in tables],
        lacking=lacking,
        departures=departures(runs, own_departures),
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
    source, metrics = table.source, list(table.metrics)
    _, *every = subjects_of(table)

    def title_of(subject: int) -> str:
        return f"Subject {subject}" if subject else f"Mean of subjects {', '.join(map(who, every))}"

    mean, *subjects = (
        MetricTable(title_of(subject), metrics, [line for row in table.rows for line in _lines(table, row, subject)])
        for subject in subjects_of(table)
    )
    published = [
        PublishedRow(
            f"{item.method}, subject {item.subjects}", published_cells(table, item), item.protocol, item.source, False
        )
        for item in published_rows(table)
    ]
    maps = _maps(table)
    strips, grids = ([], _grids(table, runs)) if maps else (_strips(table, runs), [])
    return TableView(source.title, source.note, mean, subjects, published, strips, maps, grids)


def _lines(table: StudyTable, row: StudyRow, subject: int) -> list[TableRow]:
    """Return a row of one subject or of the mean, and below it its difference to the row it is tested against."""
    metrics, kind = list(table.metrics), "main" if row.label == table.source.against else "point"
    label = row.label
    if remark := row.remark(subject):
        label = f"{label} ({remark})"
    if subject not in row.scores:
        return [TableRow(label, [(NOT_RUN, "", "") for _ in metrics], kind)]
    lines = [TableRow(label, point_cells(row.scores[subject].metrics, metrics), kind)]
    if subject == ALL_SUBJECTS and row.differences:
        cells = difference_cells(metrics, row.differences)
        lines.append(TableRow(f"− {table.source.against}", cells, "difference"))
    return lines


def _strips(table: StudyTable, runs: Runs) -> list[Case]:
    """Return pictures of the first subject and seed, spread evenly over its images: what was seen, one of each row."""
    place = next(iter(table.rows[0].source.folders))
    shown = [row.source for row in table.rows if runs.entry(row.source, place)]
    if not shown or len(shown) > MAX_STRIP:
        return []
    ids = set.intersection(*(set(runs.metrics(row.folders[place])["images"][str(place[0])]) for row in shown))
    return [
        Case(
            image_id,
            data_uri(_original(shown[0], place, image_id), SIDE),
            [(row.label, [data_uri(_picture(runs, row, place, image_id), SIDE)]) for row in shown],
        )
        for image_id in spread(sorted(ids), NUM_STRIPS)
    ]


def _original(row: RowSource, place: Place, image_id: int) -> Path:
    return row.folders[place] / "reconstructions" / ORIGINAL / image_name(image_id) / PICTURE


def _picture(runs: Runs, row: RowSource, place: Place, image_id: int) -> Path:
    folder = row.folders[place] / runs.entry(row, place)["folder"]
    return Path(folder) / image_name(image_id) / repeat_file(0)


def _maps(table: StudyTable) -> list[Chart]:
    """Return heat maps over kappa and eta of the means over subjects, where rows span both."""
    guided = [row for row in table.rows if row.source.point.is_guided and not row.source.point.settings]
    points = {row.source.point for row in guided}
    kappas, etas = {point.kappa for point in points}, {point.eta for point in points}
    if min(len(kappas), len(etas)) < 2 or len(points) < len(kappas) * len(etas):
        return []
    charts = []
    for metric in [each for each in table.metrics if each.kind in ("low-level", "high-level")][:NUM_MAPS]:
        if values := {row.source.point: _mean(row, metric) for row in guided if ALL_SUBJECTS in row.scores}:
            charts.append(guidance_map(metric, "", values, None))
    return charts


def _grids(table: StudyTable, runs: Runs) -> list[PictureGrid]:
    """Return pictures over kappa and eta of the first subject and seed."""
    row = next(row.source for row in table.rows if row.source.point.is_guided)
    folder = next(iter(row.folders.values()))
    return picture_grids(Findings(folder)) if runs.metrics(folder) else []


def _mean(row: StudyRow, metric: Metric) -> float:
    return float(row.scores[ALL_SUBJECTS].metrics[metric.name]["value"])
