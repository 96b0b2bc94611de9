"""The grid of trainings as pure values: which there are, which must wait for which, what runs where, and their table.

A subject needs a decoder of all targets. With heads=single every target is its own network, trained in two stages: 16
trainings for 8 targets. With heads=joint one training makes all heads. All of them are needed once at every point of a
grid over settings. Nothing here starts a process or reads a file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from omegaconf import ListConfig, OmegaConf
from rich.table import Table

from launch.plans.hosts import Host
from launch.recipe import for_every_target
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.schema import TARGETS

State = Literal["waiting", "running", "saved", "done", "failed", "blocked"]
JOINT = "all"
Point = tuple[str, ...]
"""Words ``key=value`` of one point of a grid over settings."""


@dataclass(frozen=True)
class GridRequest:
    """What `nd train` was asked for.

    Args:
        subjects: Target subjects; empty: the recipe's.
        stages: Stages; empty: the recipe's.
        all_targets: Every known target, instead of the recipe's.
        ranks: Ranks of one training.
        at_once: Trainings at a time on one host; none: as many as its slots hold.
        points: Points of a grid over settings; the one without words is the recipe itself.
    """

    subjects: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    all_targets: bool = False
    ranks: int = 1
    at_once: int | None = None
    points: tuple[Point, ...] = ((),)


@dataclass(frozen=True, order=True)
class Training:
    """One stage of one network of one subject.

    Args:
        subject: Its target subject.
        targets: What it predicts.
        stage: 1 or 2.
        run_dir: Its run folder; both stages share it.
        point: Settings of its own.
    """

    subject: int
    targets: tuple[str, ...]
    stage: int
    run_dir: Path
    point: Point = ()

    @property
    def network(self) -> str:
        """Name of the network among the subject's."""
        return self.targets[0] if len(self.targets) == 1 else JOINT

    @property
    def name(self) -> str:
        """Name in tables, logs and messages."""
        return " ".join([*self.point, f"subj{self.subject:02d} {self.network} stage {self.stage}"])

    @property
    def overrides(self) -> tuple[str, ...]:
        """What turns the grid's recipe into this training's."""
        return (
            *self.point,
            f"run_dir={self.run_dir}",
            f"training.target_subject={self.subject}",
            f"training.targets=[{','.join(self.targets)}]",
            f"training.stages=[{self.stage}]",
        )


@dataclass(frozen=True)
class Slot:
    """A place for one training.

    Args:
        number: Counts the places.
        host: Where.
        devices: GPUs it may use there; none on a machine without.
        is_local: Whether that is the machine that runs the grid.
    """

    number: int
    host: str
    devices: tuple[int, ...]
    is_local: bool


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of an option such as ``1,2,5,7``.

    Raises:
        ConfigError: it is no list of numbers.
    """
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise ConfigError("An option is not a list of numbers.", where=option, expected="1,2", found=text) from error


def points_of(words: Sequence[str], is_value: Callable[[str], bool]) -> tuple[list[str], tuple[Point, ...]]:
    """Return the words that hold everywhere, and the points that the others span.

    Args:
        words: ``key=value``; a list that the setting itself does not take is an axis, of one point for each entry.
        is_value: Whether a setting takes what a word says.

    Raises:
        ConfigError: there is no axis.
    """
    plain: list[str] = []
    axes: list[list[str]] = []
    for word in words:
        key = word.partition("=")[0]
        values = OmegaConf.select(OmegaConf.from_dotlist([word]), key) if "=[" in word else None
        if isinstance(values, ListConfig) and not is_value(word):
            axes.append([f"{key}={_yaml(entry)}" for entry in values])
        else:
            plain.append(word)
    if not axes:
        raise ConfigError("There is nothing to vary.", where="--grid", expected="training.learning_rate=[1e-4,3e-4]")
    return plain, tuple(itertools.product(*axes))


def _yaml(value: object) -> str:
    """Return a value as it is written on the command line."""
    return json.dumps(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else json.dumps(value).strip('"')


def recipe_at(config: Config, point: Point) -> Config:
    """Return the recipe at a point."""
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in point)}
    return for_every_target(config.replaced(settings), settings)


def subject_dir(config: Config, subject: int, point: Point = ()) -> Path:
    """Return the run folder that evaluates a subject: its merged decoder goes there."""
    words = [word[word.rindex(".", 0, word.index("=")) + 1 :] if "." in word.split("=")[0] else word for word in point]
    return config.run_dir / file_name("_".join(words)) / f"subj{subject:02d}"


def file_name(text: str) -> str:
    """Return a text as the name of a file."""
    return re.sub(r"[^\w.,=+-]+", "-", text)


def plan_grid(config: Config, request: GridRequest) -> tuple[Training, ...]:
    """Return the trainings in the order in which they should start.

    Raises:
        ConfigError: a subject is not in the recipe's data.
    """
    subjects = request.subjects or (config.training.target_subject,)
    if missing := sorted(set(subjects) - set(config.data.subjects)):
        raise ConfigError(
            f"Subjects {missing} are not in the recipe.", where="--subjects", expected=list(config.data.subjects)
        )
    plan: list[Training] = []
    for point, subject in itertools.product(request.points, subjects):
        own, folder = recipe_at(config, point), subject_dir(config, subject, point)
        targets = TARGETS if request.all_targets else own.training.targets
        is_joint = own.decoder.heads == "joint"
        for network in [targets] if is_joint else [(name,) for name in targets]:
            run_dir = folder if is_joint else folder / network[0]
            stages = sorted(request.stages or own.training.stages)
            plan += [Training(subject, tuple(network), stage, run_dir, point) for stage in stages]
    return tuple(plan)


def plan_slots(hosts: Sequence[Host], request: GridRequest, has_gpus: bool, is_local: bool) -> tuple[Slot, ...]:
    """Return the places for trainings: every host's slots in groups of ``request.ranks``.

    Raises:
        ConfigError: no host has that many slots.
    """
    slots: list[Slot] = []
    for host in hosts:
        num = request.at_once if request.at_once is not None else host.slots // request.ranks
        for i in range(num):
            first = i * request.ranks % max(1, host.slots)
            chosen = [host.device_ids[(first + k) % host.slots] for k in range(request.ranks)] if has_gpus else []
            slots.append(Slot(len(slots), host.login, tuple(chosen), is_local))
    if not slots:
        raise ConfigError(
            "No host has room for one training.",
            where=", ".join(f"{host.name} slots={host.slots}" for host in hosts),
            expected=f"{request.ranks} slots on one host",
        )
    return tuple(slots)


def next_starts(
    plan: Sequence[Training], states: Mapping[Training, State], free: Sequence[Slot]
) -> list[tuple[Training, Slot]]:
    """Return what to start now: trainings whose first stage is done, in the plan's order, one for each free slot."""
    ready = [t for t in plan if states[t] in ("waiting", "saved") and not _waits_for(t, states)]
    return list(zip(ready, free, strict=False))


def _waits_for(training: Training, states: Mapping[Training, State]) -> list[Training]:
    """Return the earlier stages of the same network that are part of the plan and not done."""
    return [
        other
        for other, state in states.items()
        if other.run_dir == training.run_dir and other.stage < training.stage and state != "done"
    ]


def blocked(plan: Sequence[Training], states: Mapping[Training, State]) -> list[Training]:
    """Return trainings that wait for one that failed."""
    return [
        training
        for training in plan
        if states[training] in ("waiting", "saved")
        and any(states[other] in ("failed", "blocked") for other in _waits_for(training, states))
    ]


def grid_table(plan: Sequence[Training], states: Mapping[Training, State], shares: Mapping[Training, float]) -> Table:
    """Return one table of all trainings: a row per subject and network, a column per stage.

    Args:
        plan: The trainings.
        states: How each stands.
        shares: Share of its steps that each has made, 0..1.
    """
    stages = sorted({training.stage for training in plan})
    has_points = any(training.point for training in plan)
    first = ["settings"] if has_points else []
    table = Table(*first, "subject", "network", *(f"stage {stage}" for stage in stages))
    for point, subject, network in dict.fromkeys((t.point, t.subject, t.network) for t in plan):
        row = {t.stage: t for t in plan if (t.point, t.subject, t.network) == (point, subject, network)}
        cells = (_cell(states[row[stage]], shares[row[stage]]) for stage in stages)
        table.add_row(*([" ".join(point)] if has_points else []), f"{subject:02d}", network, *cells)
    return table


def _cell(state: State, share: float) -> str:
    """Return how a training stands, with its share of steps where it has begun."""
    return f"{state} {share:.0%}" if state in ("running", "saved", "failed") and share > 0 else state
