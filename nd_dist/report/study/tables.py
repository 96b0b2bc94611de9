"""The tables of a study: rows from many runs, averaged over seeds and subjects, tested against one of them.

Reads run folders only; a run that is not there is a row that says so. Data sets stand beside each other: nothing is
averaged over two of them, since they have no image in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, tested
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.files import read_json
from nd_dist.metrics.published import PUBLISHED, Published
from nd_dist.metrics.statistics.scores import Scores, Statistics, mean_of_scores
from nd_dist.metrics.table import Metric, metric_of, ordered

NOT_RUN = "not run"


class Place(NamedTuple):
    """Whose brain of which data set, and which seed."""

    source: str
    subject: int
    seed: int


class Whose(NamedTuple):
    """A column of subjects: one of a data set, or with 0 the mean over all of it."""

    source: str
    subject: int

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean over subjects."""
        return self.subject == ALL_SUBJECTS

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.source} {'mean' if self.is_mean else self.subject}"


class Evaluated(NamedTuple):
    """Where the pictures of a place lie, and how they were made."""

    folder: Path
    point: Point


@dataclass(frozen=True)
class RowSource:
    """Where a row's numbers come from.

    Args:
        label: First column.
        places: What was, or is to be, evaluated.
    """

    label: str
    places: Mapping[Place, Evaluated]

    @property
    def point(self) -> Point:
        """How the pictures of the first place are made."""
        return next(iter(self.places.values())).point


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


Differences = Mapping[str, Mapping[str, Any]]  # metric -> value, interval, p


@dataclass(frozen=True)
class StudyRow:
    """One row with its numbers.

    Args:
        source: Where they come from.
        scores: Subject, or mean over them, -> scores, seeds averaged. What lacks is not there.
        lacking: Runs that are not there.
        differences: Data set -> paired differences of the mean to the row that is tested against.
    """

    source: RowSource
    scores: Mapping[Whose, Scores]
    lacking: tuple[Place, ...]
    differences: Mapping[str, Differences] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """First column."""
        return self.source.label

    def labelled(self, source: str) -> str:
        """Return the label, with what is missing of a data set."""
        lacking = [f"subject {place.subject} seed {place.seed}" for place in self.lacking if place.source == source]
        return f"{self.label} ({', '.join(lacking)} {NOT_RUN})" if lacking else self.label

    def item(self, whose: Whose, metric: Metric) -> Mapping[str, Any] | None:
        """Return a metric's value with its interval; None where it was not computed."""
        found = self.scores.get(whose)
        return found.metrics.get(metric.name) if found else None


@dataclass(frozen=True)
class StudyTable:
    """A table with its numbers."""

    source: TableSource
    rows: tuple[StudyRow, ...]
    metrics: tuple[Metric, ...]

    @property
    def columns(self) -> list[Whose]:
        """The mean over each data set's subjects, and after it each of them."""
        places = dict.fromkeys((place.source, place.subject) for row in self.rows for place in row.source.places)
        sources = dict.fromkeys(source for source, _ in places)
        return [Whose(s, each) for s in sources for each in (ALL_SUBJECTS, *(i for name, i in places if name == s))]

    @property
    def published(self) -> list[Published]:
        """Published rows that stand beside it."""
        return [item for item in PUBLISHED if item.method in self.source.published]


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

    def entry(self, row: RowSource, place: Place) -> dict[str, Any]:
        """Return the entry of a row's point in a run, empty where it was not evaluated."""
        if place not in row.places:
            return {}
        folder, point = row.places[place]
        metrics = self.metrics(folder)
        entries = [*metrics.get("points", []), *metrics.get("controls", [])]
        return next((e for e in entries if (Point.of(e), e["subject"]) == (point, place.subject)), {})

    def scores(self, row: RowSource, place: Place) -> Scores | None:
        """Return the scores of a row's point in a run, None where it was not evaluated."""
        if not self.entry(row, place):
            return None
        folder, point = row.places[place]
        layout = Layout(folder, self.metrics(folder)["protocol"])
        return read_scores(*layout.score_folders(point, place.subject))


def finished_runs(sources: Sequence[TableSource], runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Return data set -> content of its runs' metrics.json.

    Raises:
        DataError: nothing is evaluated yet, or runs were scored by different protocols.
    """
    folders = {
        (place.source, at.folder): None for table in sources for row in table.rows for place, at in row.places.items()
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for source, folder in folders:
        if metrics := runs.metrics(folder):
            found.setdefault(source, []).append(metrics)
    if not found:
        raise DataError("Nothing of the study is evaluated yet.", todo="run `nd study run` first")
    _require_equal("protocol", [each for every in found.values() for each in every])
    for every in found.values():
        _require_equal("simulated", every)
    return found


def _require_equal(name: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs that differ in a fact."""
    if len(values := {str(each.get(name)) for each in metrics}) > 1:
        raise DataError(f"Runs of the study differ in what must be equal: {name}.", found=", ".join(sorted(values)))


def study_table(source: TableSource, runs: Runs, statistics: Statistics) -> StudyTable:
    """Return a table with its numbers."""
    rows = [_row(row, runs, statistics) for row in source.rows]
    for name in dict.fromkeys(place.source for row in rows for place in row.source.places):
        rows = _tested(rows, source.against, Whose(name, ALL_SUBJECTS))
    known = [item for row in rows for scores in row.scores.values() for item in scores.metrics.items()]
    directions = {name: bool(item["higher_is_better"]) for name, item in known}
    return StudyTable(source, tuple(rows), tuple(metric_of(name, directions[name]) for name in ordered(directions)))


def _tested(rows: Sequence[StudyRow], against: str, mean: Whose) -> list[StudyRow]:
    """Return rows with the differences of their means over a data set to one of them, corrected together."""
    means = {row.label: row.scores[mean] for row in rows if mean in row.scores}
    if against not in means:
        return list(rows)
    compared = [row for row in rows if row.label in means and row.label != against]
    pairs = [(0, row.source.point, against, means[row.label], means[against]) for row in compared]
    found = {row.label: item["differences"] for row, item in zip(compared, tested(pairs), strict=True)}
    return [replace(row, differences={**row.differences, mean.source: found.get(row.label, {})}) for row in rows]


def _row(source: RowSource, runs: Runs, statistics: Statistics) -> StudyRow:
    """Return a row: seeds averaged within each subject, then subjects, where every subject has one."""
    found = {place: runs.scores(source, place) for place in source.places}
    scores: dict[Whose, Scores] = {}
    for name in dict.fromkeys(place.source for place in found):
        subjects = dict.fromkeys(place.subject for place in found if place.source == name)
        own = {
            subject: {place.seed: part for place, part in found.items() if place[:2] == (name, subject) and part}
            for subject in subjects
        }
        means = {subject: _over_seeds(parts, statistics) for subject, parts in own.items() if parts}
        if len(means) == len(subjects):
            mean, every = mean_of_scores(list(means.values()), statistics), {tuple(parts) for parts in own.values()}
            seeds = next(iter(every)) if len(every) == 1 else ()  # no range where subjects have different seeds
            of_seed = [mean_of_scores([parts[seed] for parts in own.values()], statistics) for seed in seeds]
            scores[Whose(name, ALL_SUBJECTS)] = _with_range(mean, of_seed)
        scores |= {Whose(name, subject): mean for subject, mean in means.items()}
    return StudyRow(source, scores, tuple(place for place, part in found.items() if part is None))


def _over_seeds(parts: Mapping[int, Scores], statistics: Statistics) -> Scores:
    """Return the mean of a subject's scores over seeds."""
    return _with_range(mean_of_scores(list(parts.values()), statistics), list(parts.values()))


def _with_range(mean: Scores, seeds: Sequence[Scores]) -> Scores:
    """Return a mean whose metrics also say, where seeds differ, from where to where their values go (``seeds``)."""
    metrics: dict[str, Mapping[str, Any]] = {}
    for name, item in mean.metrics.items():
        values = [float(each.metrics[name]["value"]) for each in seeds]
        differ = len(set(values)) > 1
        metrics[name] = {**item, "seeds": (min(values), max(values))} if differ else item
    return replace(mean, metrics=metrics)


def honesty(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return, apart from each other, whether data, model and judges of a run are real."""
    provenance, made_up = metrics["provenance"], metrics.get("simulated")
    config, remark = provenance["config"], provenance.get("networks", {}).get("remark", "")
    data = "simulated: made up, not human brains" if made_up else "real, as their reader states"
    names = {name for entry in metrics["points"] for name in entry["metrics"]}
    stand_ins = any(metric_of(name).stands_for for name in names)
    judges = "simulated: small networks of the made-up world" if stand_ins else ", ".join(provenance["judges"])
    is_phantom = str(config["model"]).startswith("phantom/")
    model = f"simulated: small networks of the made-up world ({config['model']})" if is_phantom else config["model"]
    return [
        ("Data", "not stated by the shards" if made_up is None else data),
        ("Model", f"{model}. {remark}" if remark else model),
        ("Judges", judges or "none: metrics of pixels alone"),
    ]


def departures(found: Mapping[str, Sequence[Mapping[str, Any]]], own: Sequence[str]) -> list[str]:
    """Return every departure from the published procedure: the study's, then what the runs say of themselves."""
    told = [line for every in found.values() for metrics in every for line in metrics.get("departures", [])]
    return list(dict.fromkeys([*own, *told]))
