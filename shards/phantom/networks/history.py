"""How the networks of a folder set were trained: kept beside them, shown on their cards."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from nd_dist.config.base import Section
from nd_dist.events import events_path, read_events
from nd_dist.files import read_json, write_json
from shards.phantom.networks.settings import NetworkName, NetworkRecipe

HISTORY = "training.json"
STARTED = "network_start"


class History(Section):
    """How one network was trained."""

    recipe: NetworkRecipe
    """What it was trained with."""
    steps: int
    """Optimizer steps made."""
    minutes: float
    """Time of these steps, without starts and checkpoints."""
    machine: str
    """Ranks and their devices."""


def machine(ranks: int) -> str:
    """Return what this rank computes on, and how many there are of it."""
    if torch.cuda.is_available():
        return f"{ranks} rank(s), a {torch.cuda.get_device_name()} each"
    threads = torch.get_num_threads()
    return f"{ranks} rank(s) of {threads} thread(s), {platform.machine()}, {os.cpu_count()} cores on a host"


def history_of(out_dir: Path, name: NetworkName, recipe: NetworkRecipe, steps: int) -> History:
    """Return how a network in ``out_dir`` was trained, from the events of rank 0."""
    seconds: dict[int, float] = {}
    where = "unknown"
    for event in read_events(events_path(out_dir, 0)):
        if event.get("stage") != name:
            continue
        if event["event"] == "train_step" and event["step"] < steps:
            seconds[event["step"]] = event["step_s"]
        elif event["event"] == STARTED:
            where = event["machine"]
    return History(recipe=recipe, steps=steps, minutes=round(sum(seconds.values()) / 60, 1), machine=where)


def write_history(folder: Path, histories: dict[NetworkName, History]) -> None:
    """Write how the networks of a folder set were trained."""
    write_json(folder / HISTORY, {name: history.model_dump(mode="json") for name, history in histories.items()})


def read_history(folder: Path) -> dict[NetworkName, History]:
    """Return how the networks of a folder set were trained.

    Raises:
        DataError: the folder set does not say.
    """
    return {name: History.model_validate(values) for name, values in read_json(folder / HISTORY).items()}
