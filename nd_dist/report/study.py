"""The tables of a study: rows from many runs, averaged over seeds and subjects, tested against one of them.

Reads run folders only; a run that is not there is a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, tested
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.files import read_json
from nd_dist.metrics.statistics.scores import Scores, Statistics, mean_of_scores
from nd_dist.metrics.table import Metric, metric_of, ordered

Place = tuple[int, int]  # subject, seed
NOT_RUN = "not run"


@dataclass(frozen=True)
class RowSource:
    """Where a row's numbers come from.

    Args:
        label: First column.
        point: How its pictures were made.
        folders: (subject, seed) -> run folder.
    """

    label: str
    point: Point
    folders: Mapping[Place, Path]


@dataclass(frozen=True)
class TableSource:
    """A table that is asked for.

    Args:
        title, note: What stands above it.
        rows: Its rows.
        against: Label of the row that all others are tested against; empty: none.
        published: Methods whose published rows stand beside it.
    """

    title: str
    rows: tuple[RowSource, ...]
    against: str = ""
    published: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class StudyRow:
    """One row with its numbers.

    Args:
        source: Where they come from.
        scores: Subject -> scores, seeds averaged; 0 is the mean over all subjects. Those that lack are not there.
        lacking: (subject, seed) of the runs that are not there.
        differences: Metric -> paired difference of the mean to the row that is tested against.
    """

    source: RowSource
    scores: Mapping[int, Scores]
    lacking: tuple[Place, ...]
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """First column."""
        return self.source.label

    def remark(self, subject: int) -> str:
        """Return what is missing of a subject, or of the mean; empty where nothing is."""
        seeds = [(whose, seed) for whose, seed in self.lacking if subject in (whose, ALL_SUBJECTS)]
        return ", ".join(f"subject {whose} seed {seed} {NOT_RUN}" for whose, seed in seeds)


@dataclass(frozen=True)
class StudyTable:
    """A table with its numbers."""

    source: TableSource
    rows: tuple[StudyRow, ...]
    metrics: tuple[Metric, ...]


class Runs:
    """The run folders of a study, each read once."""

    def __init__(self) -> None:
        self._metrics: dict[Path, dict[str, Any]] = {}

    def metrics(self, folder: Path) -> dict[str, Any]:
        """Return a run's metrics.json, empty where there is none."""
        if folder not in self._metrics:
            path = folder / "metrics.json"
            self._metrics[folder] = read_json(path) if path.is_file() else {}
        return self._metrics[folder]

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The content of every metrics.json that was read."""
        return [content for content in self._metrics.values() if content]

    def entry(self, row: RowSource, place: Place) -> dict[str, Any]:
        """Return the entry of a row's point in a run, empty where it was not evaluated."""
        metrics = self.metrics(row.folders[place])
        entries = [*metrics.get("points", []), *metrics.get("controls", [])]
        return next((e for e in entries if (Point.of(e), e["subject"]) == (row.point, place[0])), {})

    def scores(self, row: RowSource, place: Place) -> Scores | None:
        """Return the scores of a row's point in a run, None where it was not evaluated."""
        if not self.entry(row, place):
            return None
        layout = Layout(row.folders[place], self.metrics(row.folders[place])["protocol"])
        return read_scores(*layout.score_folders(row.point, place[0]))


def study_tables(sources: Sequence[TableSource], runs: Runs) -> list[StudyTable]:
    """Return the tables with their numbers.

    Raises:
        DataError: nothing is evaluated yet, or runs were scored by different protocols.
    """
    folders = {folder for table in sources for row in table.rows for folder in row.folders.values()}
    found = [metrics for folder in sorted(folders) if (metrics := runs.metrics(folder))]
    if not found:
        raise DataError("Nothing of the study is evaluated yet.", todo="run `nd study run` first")
    for name in ("protocol", "simulated"):
        if len(values := {str(metrics.get(name)) for metrics in found}) > 1:
            found_values = ", ".join(sorted(values))
            raise DataError(f"Runs of the study differ in what must be equal: {name}.", found=found_values)
    statistics = Statistics(int(found[0]["provenance"]["bootstrap"]))
    return [_table(source, runs, statistics) for source in sources]


def _table(source: TableSource, runs: Runs, statistics: Statistics) -> StudyTable:
    rows = [_row(row, runs, statistics) for row in source.rows]
    reference = next((row.scores.get(ALL_SUBJECTS) for row in rows if row.label == source.against), None)
    compared = [row for row in rows if row.label != source.against and ALL_SUBJECTS in row.scores]
    if reference is not None:
        pairs = [(0, row.source.point, source.against, row.scores[ALL_SUBJECTS], reference) for row in compared]
        differences = {id(row): item["differences"] for row, item in zip(compared, tested(pairs), strict=True)}
        rows = [StudyRow(row.source, row.scores, row.lacking, differences.get(id(row), {})) for row in rows]
    known = [item for row in rows for scores in row.scores.values() for item in scores.metrics.items()]
    directions = {name: bool(item["higher_is_better"]) for name, item in known}
    return StudyTable(source, tuple(rows), tuple(metric_of(name, directions[name]) for name in ordered(directions)))


def _row(source: RowSource, runs: Runs, statistics: Statistics) -> StudyRow:
    """Return a row: seeds averaged within each subject, then subjects, where every subject has one."""
    found = {place: runs.scores(source, place) for place in source.folders}
    subjects = list(dict.fromkeys(subject for subject, _ in found))
    scores: dict[int, Scores] = {}
    for subject in subjects:
        own = [part for (whose, _), part in found.items() if whose == subject and part is not None]
        if own:
            scores[subject] = mean_of_scores(own, statistics)
    if len(scores) == len(subjects):
        scores[ALL_SUBJECTS] = mean_of_scores([scores[subject] for subject in subjects], statistics)
    return StudyRow(source, scores, tuple(place for place, part in found.items() if part is None))


def honesty(runs: Runs) -> list[tuple[str, str]]:
    """Return, apart from each other, whether data, model and judges are real."""
    metrics = runs.finished[0]
    simulated = {True: "simulated: a made-up NSD, not human brains", False: "real, as their reader states"}
    provenance, made_up = metrics["provenance"], metrics.get("simulated")
    config, remark = provenance["config"], provenance.get("networks", {}).get("remark", "")
    names = {name for entry in metrics["points"] for name in entry["metrics"]}
    has_stand_ins = any(metric_of(name).stands_for for name in names)
    judges = "simulated: small networks of the made-up world" if has_stand_ins else ", ".join(provenance["judges"])
    is_phantom = str(config["model"]).startswith("phantom/")
    model = f"simulated: small networks of the made-up world ({config['model']})" if is_phantom else config["model"]
    return [
        ("Data", "not stated by the shards" if made_up is None else simulated[bool(made_up)]),
        ("Model", f"{model}. {remark}" if remark else model),
        ("Judges", judges or "none: metrics of pixels alone"),
        ("Protocol", metrics["protocol"]),
    ]


def departures(runs: Runs, own: Sequence[str]) -> list[str]:
    """Return every departure from the published procedure: the study's, then what the runs say of themselves."""
    told = [line for metrics in runs.finished for line in metrics.get("departures", [])]
    return list(dict.fromkeys([*own, *told]))
