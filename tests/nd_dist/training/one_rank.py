"""A whole training in a world of one, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nd_dist.config import Config
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.synthetic import SyntheticSource

Events = list[dict[str, Any]]


def run(
    config: Config, source: SyntheticSource | None = None, should_stop: Callable[[], bool] = lambda: False
) -> Events:
    """Train, and return the events of this call only."""
    path = events_path(config.run_dir, 0)
    before = len(list(read_events(path)))
    log = EventLog(config.run_dir, 0, "train")
    try:
        train(config, World(), source or SyntheticSource(), log, should_stop)
    finally:
        events = list(read_events(path))[before:]
    return events


def losses(events: Events) -> dict[tuple[int, int], float]:
    return {(e["stage"], e["step"]): e["loss"] for e in events if e["event"] == "train_step"}


def names(events: Events) -> list[str]:
    return [event["event"] for event in events]
