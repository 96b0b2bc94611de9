"""How a training of the grid stands, read from its run folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from launch.grid.plan import State, Training, recipe_at
from launch.supervise.checks import Checks, check_stage, checks_of
from nd_dist.config import Config
from nd_dist.errors import Requeue
from nd_dist.events import events_path, read_events
from nd_dist.training.records import read_done, stage_dir
from shards.format.index import Index

TAIL_BYTES = 4096


def state_on_disk(config: Config, training: Training, index: Index) -> State:
    """Return how a training stands before anything runs.

    Raises:
        CheckpointError: it was made with another recipe.
    """
    folder = stage_dir(training.run_dir, training.stage)
    if not read_done(folder):
        return "saved" if (folder / "latest.json").exists() else "waiting"
    check_stage(config_of(config, training), index, training.stage)
    return "done"


def config_of(config: Config, training: Training) -> Config:
    """Return the recipe of one training."""
    config = recipe_at(config, training.point)
    section = config.training.model_copy(
        update={"target_subject": training.subject, "targets": training.targets, "stages": (training.stage,)}
    )
    return config.model_copy(update={"training": section, "run_dir": training.run_dir})


def grid_checks(config: Config, plan: Sequence[Training], ranks: int, coming: Collection[str] = ()) -> Checks:
    """Return the checks of all trainings; memory and disk, which take seconds, only of the first subject's."""
    checks: Checks = {}
    for training in plan:
        found = checks_of("train", config_of(config, training), ranks, coming)
        if training.subject != plan[0].subject:
            found.pop("room", None)
        checks |= {f"{training.name}, {name}": check for name, check in found.items()}
    return checks


def outcome_of(training: Training, returncode: int) -> State:
    """Return how a training ended: its completion record counts, not its exit code."""
    folder = stage_dir(training.run_dir, training.stage)
    if read_done(folder):
        return "done"
    return "saved" if returncode == Requeue.exit_code else "failed"


def share_of(training: Training, state: State) -> float:
    """Return the share of its steps that a training has made, from its last progress event."""
    if state == "done":
        return 1.0
    path = events_path(training.run_dir, 0)
    if not path.exists():
        return 0.0
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    return next((found for line in reversed(lines) if (found := _share_of_line(line, training.stage)) >= 0), 0.0)


def _share_of_line(line: str, stage: int) -> float:
    """Return the share that a line of events tells; -1 if it tells none."""
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # the first line of the tail is cut
        return -1.0
    is_own = event.get("event") == "progress" and event.get("task") == f"stage {stage}"
    return float(event["done"]) / max(1, int(event["total"])) if is_own else -1.0


def validations_of(training: Training) -> list[dict[str, Any]]:
    """Return the validations of a training in the order in which they were made."""
    events = read_events(events_path(training.run_dir, 0))
    found = [event for event in events if event["event"] == "validation" and event["stage"] == training.stage]
    return list({event["step"]: event for event in found}.values())  # a step made again counts once
