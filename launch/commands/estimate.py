"""`nd train --estimate`: times some steps of a training, or of each kind of training in a grid, and prints the costs.

The steps are made in a folder that is removed again. Pace, bytes and files are measured in it; memory is counted.
"""

from __future__ import annotations

import heapq
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.commands.launching import launch_command
from launch.console import make_console
from launch.grid.plan import GridRequest, Training
from launch.grid.run import make_grid
from launch.grid.state import config_of
from launch.plans.choose import LaunchOptions
from launch.supervise.checks import read_index
from launch.supervise.memory import needed_bytes, stage_counts
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.events import events_path, read_events
from nd_dist.training.records import stage_dir
from nd_dist.training.source import stage_length, stage_request
from shards.format.index import Index

ESTIMATED_STEPS, WARM_STEPS = 24, 4
"""Steps that an estimate makes, and those of them that do not count, as libraries choose their ways in them."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of a training takes.

    Args:
        steps: Its steps.
        pace_s: Seconds of one of them, the median of those that were made.
        gpu_bytes: Memory on each GPU, counted.
        disk_bytes: Bytes that it leaves.
        files: Files that it leaves.
    """

    steps: int
    pace_s: float
    gpu_bytes: float
    disk_bytes: int
    files: int

    @property
    def hours(self) -> float:
        """Hours of all steps; validations and checkpoints come on top."""
        return self.steps * self.pace_s / 3600


def estimate_training(config: Config, options: LaunchOptions) -> None:
    """Print what a training takes.

    Raises:
        NdDistError: see ``launch_command``.
    """
    console = make_console()
    _say(console, "", measure(config, options, console))


def estimate_grid(config: Config, request: GridRequest, options: LaunchOptions) -> None:
    """Print what every kind of training of a grid takes, and all of them together on the places that there are.

    Trainings of equal targets, settings and steps are one kind; other subjects are taken to be like the first.

    Raises:
        NdDistError: see ``launch_command`` and ``make_grid``.
    """
    console, grid, index = make_console(), make_grid(config, request, options), read_index(config)
    alone = LaunchOptions(ranks=grid.ranks, launcher="local")
    costs: dict[object, dict[int, StageCost]] = {}
    hours, on_disk, files, most = dict[Path, float](), 0, 0, 0.0
    for training in grid.plan:
        kind = _kind(config, training, index)
        if kind not in costs:
            own = config_of(config, training)
            stages = sorted({other.stage for other in grid.plan})
            own = own.model_copy(update={"training": own.training.model_copy(update={"stages": tuple(stages)})})
            costs[kind] = measure(own, alone, console)
            _say(console, " ".join([*training.point, training.network, ""]), costs[kind])
        cost = costs[kind][training.stage]
        hours[training.run_dir] = hours.get(training.run_dir, 0.0) + cost.hours
        on_disk, files, most = on_disk + cost.disk_bytes, files + cost.files, max(most, cost.gpu_bytes)
    wall, work = _makespan(hours, len(grid.slots)), sum(hours.values())
    console.print(
        f"  estimate: {len(grid.plan)} trainings, {len(grid.slots)} at once: {wall:.2g} hours "
        f"({work:.2g} one after another), {most / 1e9:.1f} GB on each GPU (counted), "
        f"{on_disk / 1e9:.2g} GB of disk, {files:,} files"
    )


def measure(config: Config, options: LaunchOptions, console: Console) -> dict[int, StageCost]:
    """Make some steps of every stage in a folder that is removed again; return stage -> what it takes.

    Raises:
        NdDistError: see ``launch_command``.
        ConfigError: the recipe is not trained in steps of its own batch.
    """
    training, folder = config.training, config.run_dir / "estimate"
    if training.rows_per_rank is not None:
        raise ConfigError("An estimate is of the recipe's own batch.", todo="leave training.rows_per_rank out")
    if config.decoder.kind == "ridge":
        raise ConfigError("A ridge regression has no steps to time.", todo="see its cost with --dry-run")
    few = {
        "steps": (ESTIMATED_STEPS, ESTIMATED_STEPS),
        "samples_per_subject": (training.schedule(1)[1], training.schedule(2)[1]),
        "per_target": {},
        "checkpoint_every": ESTIMATED_STEPS,
        "validate_every": ESTIMATED_STEPS,
    }
    section = training.model_copy(update=few)
    try:
        launch_command("train", config.model_copy(update={"run_dir": folder, "training": section}), options, console)
        events = [event for event in read_events(events_path(folder, 0)) if event["event"] == "train_step"]
        left = {stage: _left(stage_dir(folder, stage), training.keep_checkpoints) for stage in training.stages}
        ranks = len(list(events_path(folder, 0).parent.iterdir()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    index = read_index(config)
    specs = [spec for spec in index.target_specs if spec.name in training.targets]
    needed = needed_bytes(stage_counts(config, index.num_voxels, specs, ranks), training, ranks)
    costs: dict[int, StageCost] = {}
    for stage in training.stages:
        times = [event["step_s"] for event in events if event["stage"] == stage and event["step"] >= WARM_STEPS]
        steps = stage_length(config, stage_request(config, stage, 1))[0]
        costs[stage] = StageCost(steps, statistics.median(times), needed[stage], *left[stage])
    return costs


def _left(folder: Path, keep_checkpoints: int) -> tuple[int, int]:
    """Return bytes and files of a stage, its one checkpoint taken as often as a training keeps them."""
    num_bytes = files = 0
    for path in (path for path in folder.rglob("*") if path.is_file()):
        times = keep_checkpoints if path.relative_to(folder).parts[0].startswith("step-") else 1
        num_bytes, files = num_bytes + times * path.stat().st_size, files + times
    return num_bytes, files


def _kind(config: Config, training: Training, index: Index) -> object:
    """Return what trainings share that cost the same."""
    own = config_of(config, training).training
    shapes = sorted(spec.shape for spec in index.target_specs if spec.name in training.targets)
    return training.point, tuple(shapes), own.schedule(1), own.schedule(2)


def _makespan(hours: Mapping[Path, float], places: int) -> float:
    """Return how long networks take on equal places, each started where a place is free first."""
    free = [0.0] * places
    for own in hours.values():
        heapq.heapreplace(free, free[0] + own)
    return max(free)


def _say(console: Console, name: str, costs: Mapping[int, StageCost]) -> None:
    for stage, cost in costs.items():
        console.print(
            f"  estimate: {name}stage {stage}: {cost.steps:,} steps of {cost.pace_s:.3g} s, {cost.hours:.2g} hours "
            f"(median of {ESTIMATED_STEPS - WARM_STEPS} steps; validations and checkpoints come on top), "
            f"{cost.gpu_bytes / 1e9:.1f} GB on each GPU (counted), "
            f"{cost.disk_bytes / 1e9:.2g} GB of disk, {cost.files:,} files"
        )
