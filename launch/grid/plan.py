"""The grid of trainings as pure values: which there are, which must wait for which, what runs where, and their table.

A subject needs a decoder of all targets. With heads=single every target is its own network, trained in two stages: 16
trainings for 8 targets. With heads=joint one training makes all heads. Nothing here starts a process or reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from launch.plans.hosts import Host
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.schema import TARGETS

State = Literal["waiting", "running", "saved", "done", "failed", "blocked"]
JOINT = "all"


@dataclass(frozen=True)
class GridRequest:
    """What `nd train` was asked for.

    Args:
        subjects: Target subjects; empty: the recipe's.
        stages: Stages; empty: the recipe's.
        all_targets: Every known target, instead of the recipe's.
        ranks: Ranks of one training.
        at_once: Trainings at a time on one host; none: as many as its slots hold.
    """

    subjects: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    all_targets: bool = False
    ranks: int = 1
    at_once: int | None = None


@dataclass(frozen=True, order=True)
class Training:
    """One stage of one network of one subject.

    Args:
        subject: Its target subject.
        targets: What it predicts.
        stage: 1 or 2.
        run_dir: Its run folder; both stages share it.
    """

    subject: int
    targets: tuple[str, ...]
    stage: int
    run_dir: Path

    @property
    def network(self) -> str:
        """Name of the network among the subject's."""
        return self.targets[0] if len(self.targets) == 1 else JOINT

    @property
    def name(self) -> str:
        """Name in tables, logs and messages."""
        return f"subj{self.subject:02d} {self.network} stage {self.stage}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What turns the grid's recipe into this training's."""
        return (
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
        raise ConfigError("An option is no list of numbers.", where=option, expected="1,2", found=text) from error


def subject_dir(config: Config, subject: int) -> Path:
    """Return the run folder that evaluates a subject: its merged decoder goes there."""
    return config.run_dir / f"subj{subject:02d}"


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
    targets = TARGETS if request.all_targets else config.training.targets
    networks = [targets] if config.decoder.heads == "joint" else [(name,) for name in targets]
    plan: list[Training] = []
    for subject in subjects:
        for network in networks:
            folder = subject_dir(config, subject)
            run_dir = folder if config.decoder.heads == "joint" else folder / network[0]
            stages = sorted(request.stages or config.training.stages)
            plan += [Training(subject, tuple(network), stage, run_dir) for stage in stages]
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
    table = Table("subject", "network", *(f"stage {stage}" for stage in stages))
    for subject, network in dict.fromkeys((training.subject, training.network) for training in plan):
        row = {t.stage: t for t in plan if (t.subject, t.network) == (subject, network)}
        table.add_row(f"{subject:02d}", network, *(_cell(states[row[stage]], shares[row[stage]]) for stage in stages))
    return table


def _cell(state: State, share: float) -> str:
    """Return how a training stands, with its share of steps where it has begun."""
    return f"{state} {share:.0%}" if state in ("running", "saved", "failed") and share > 0 else state
