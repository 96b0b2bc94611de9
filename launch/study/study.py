"""What a study file says: data sets, decoders to train, runs to evaluate, tables to make. Reads one YAML file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from launch.keys import nearest
from launch.recipe import load_recipe, load_settings, shipped_path
from launch.study import STUDIES_DIR
from nd_dist.config import Config, Value
from nd_dist.config.base import Count, Section, SubjectId
from nd_dist.evaluation.points.axes import check_axes
from nd_dist.evaluation.points.units import Point, distinct_points, listed_point
from nd_dist.metrics.published import PUBLISHED

Settings = dict[str, Any]  # Any: values of every kind, by dotted key of a recipe
Names = tuple[str, ...]


class Source(Section):
    """A data set."""

    recipe: str = "paper"
    """Recipe that everything of this data set starts from."""
    settings: Settings = Field(default_factory=dict)
    """Settings of this data set alone."""
    subjects: Annotated[tuple[SubjectId, ...], Field(min_length=1)] = (1,)
    """Subjects to average over."""
    phantom_data: bool = False
    """Whether `nd phantom` writes the data before they are packed."""


class DecoderEntry(Section):
    """A decoder that is trained for every subject and seed."""

    settings: Settings = Field(default_factory=dict)
    """Settings in which its training differs from the study's."""
    stage1_of: str = ""
    """Decoder whose stage 1 it starts from, so that stage 1 is trained once; empty: its own."""
    sources: Names = ()
    """Data sets that it is trained on; empty: all."""


class Run(Section):
    """One way to reconstruct."""

    decoder: str = ""
    """Name of its decoder; empty: the first."""
    settings: dict[str, Value] = Field(default_factory=dict)
    """Settings in which its pictures are made otherwise, e.g. {sampler.kappa: 0}; {control: nearest} is a control."""
    grid: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """Settings that take several values each: the run is all their combinations."""
    sources: Names = ()
    """Data sets that it is evaluated on; empty: those of its decoder."""

    def points(self, config: Config) -> tuple[Point, ...]:
        """Return its points, given its decoder's recipe."""
        axes = [[(key, value) for value in values] for key, values in self.grid.items()]
        return distinct_points(listed_point(config, {**self.settings, **dict(on)}) for on in itertools.product(*axes))


class Table(Section):
    """A table of runs: a row for each, the protocol's metrics as columns."""

    title: str
    rows: dict[str, str]
    """Label -> run."""
    against: str = ""
    """Label of the row that all others are tested against; empty: none."""
    published: Names = ()
    """Methods whose published rows stand beside it."""
    note: str = ""
    """A sentence below the title."""


class Study(Section):
    """A study. Words of a command line set its fields; all other words are settings of every recipe in it."""

    study_dir: Path = Path("runs/study")
    """Folder of the study: every run, the state of its stages, its report."""
    sources: dict[str, Source] = Field(default_factory=dict)
    settings: Settings = Field(default_factory=dict)
    """Settings of the whole study."""
    words: Names = ()
    """Settings that were given on the command line, which hold everywhere."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    """Seeds to average over; every one is a training and an evaluation of its own."""
    decoders: dict[str, DecoderEntry] = Field(default_factory=dict)
    runs: dict[str, Run] = Field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    departures: Names = ()
    """Where the study does otherwise than the published one, a sentence each."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        """Refuse names of data sets, decoders, runs, rows and methods that there are not."""
        methods = {item.method for item in PUBLISHED}
        earlier: list[str] = []
        for name, decoder in self.decoders.items():
            _require(f"decoders.{name}.stage1_of", [decoder.stage1_of], earlier)
            _require(f"decoders.{name}.sources", decoder.sources, self.sources)
            earlier.append(name)
        for name, run in self.runs.items():
            _require(f"runs.{name}.decoder", [run.decoder], self.decoders)
            _require(f"runs.{name}.sources", run.sources, self.sources)
        for number, table in enumerate(self.tables):
            _require(f"tables.{number}.rows", table.rows.values(), self.runs)
            _require(f"tables.{number}.against", [table.against], table.rows)
            _require(f"tables.{number}.published", table.published, methods)
        if self.runs and not (self.decoders and self.sources):
            raise ValueError("there are runs but no decoder, or no source of data")
        return self

    def decoder_of(self, run: str) -> str:
        """Return the name of a run's decoder."""
        return self.runs[run].decoder or next(iter(self.decoders))

    def sources_of(self, decoder: str, run: str = "") -> list[str]:
        """Return the data sets that a decoder is trained on, or those on which a run of it is evaluated."""
        trained = self.decoders[decoder].sources or tuple(self.sources)
        wanted = self.runs[run].sources if run else ()
        return [name for name in trained if not wanted or name in wanted]


def _require(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known; an empty one stands for none."""
    known = list(known)
    for name in names:
        if name and name not in known:
            raise ValueError(f"{where}: there is no {name!r}; {nearest(name, known) or f'known: {known}'}")


def load_study(study: str, words: Sequence[str] = ()) -> Study:
    """Return a study with ``key=value`` words; those that name no field of it become settings of all its recipes.

    Raises:
        ConfigError: see ``load_settings``.
    """
    own = [word for word in words if word.partition("=")[0].partition(".")[0] in Study.model_fields]
    others = [word for word in words if word not in own]
    found = load_settings(Study, shipped_path(STUDIES_DIR, study, "study"), own)
    return found.model_copy(update={"words": (*found.words, *others)})


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def decoder_recipe(study: Study, source: str, decoder: str) -> Config:
    """Return the recipe that trains a decoder on a data set.

    Raises:
        ConfigError: a setting is wrong, or a subject is not among the data's.
    """
    data = study.sources[source]
    settings = {**study.settings, **data.settings, **study.decoders[decoder].settings}
    whose = [f"training.target_subject={data.subjects[0]}", f"evaluation.subjects={list(data.subjects)}"]
    config = load_recipe(data.recipe, [*_words(settings), *study.words, *whose], "evaluate")
    return config.replaced({"evaluation.controls": False, "evaluation.subjects": None})


def decoder_points(study: Study, source: str, decoder: str, config: Config) -> tuple[Point, ...]:
    """Return what is evaluated of a decoder on a data set: the points of all its runs, each once.

    Raises:
        ConfigError: a run differs in a setting that an evaluation cannot vary.
    """
    runs = [
        run
        for name, run in study.runs.items()
        if study.decoder_of(name) == decoder and source in study.sources_of(decoder, name)
    ]
    points = distinct_points(point for run in runs for point in run.points(config))
    check_axes(with_points(config, points))
    return points


def with_points(config: Config, points: Sequence[Point]) -> Config:
    """Return a recipe that evaluates points and nothing else."""
    listed = tuple(
        {
            "sampler.kappa": point.kappa,
            "sampler.eta": point.eta,
            **dict(point.settings),
            **({} if point.is_plain else {"control": point.control}),
        }
        for point in points
    )
    return config.replaced({"evaluation.points": listed})
