"""Tiny trainings of the phantom networks: in this process, or as one of several ranks.

``python -m tests.shards.phantom.networks.tiny OUT_DIR KILL_AT`` is one rank; the last rank kills itself before that
step, counted over all networks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nd_dist.events import EventLog, events_path, read_events
from nd_dist.training.engine.engine import connect
from nd_dist.world import World
from shards.phantom.networks.settings import NetworkName, NetworkRecipe, NetworksRecipe, Workplace
from shards.phantom.networks.stages import STAGES, run_stages
from tests.support.waiting import HANG_S

STEPS = 3


def tiny_settings(steps: int = STEPS, stages: tuple[NetworkName, ...] = STAGES) -> NetworksRecipe:
    recipe = NetworkRecipe(steps=steps, batch_size=4, learning_rate=1e-3, weight_decay=0.01, seed=5)
    recipes = {name: recipe.model_copy(update={"seed": 5 + number}) for number, name in enumerate(STAGES)}
    return NetworksRecipe(stages=stages, **recipes, warmup_steps=2, checkpoint_every=1, scaling_pictures=8)


def place_of(
    out_dir: Path,
    settings: NetworksRecipe,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Workplace:
    world = world or World()
    events = EventLog(out_dir, world.rank, "phantom_networks")
    return Workplace(out_dir, settings, events, world, connect(world, HANG_S), HANG_S, should_stop)


def losses_of(out_dir: Path) -> dict[tuple[str, int], float]:
    events = read_events(events_path(out_dir, 0))
    return {(e["stage"], e["step"]): e["loss"] for e in events if e["event"] == "train_step"}


def main() -> None:
    torch.set_num_threads(1)
    out_dir, kill_at = Path(sys.argv[1]), int(sys.argv[2])
    world, asked = World.from_env(os.environ), 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == kill_at + 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    run_stages(place_of(out_dir, tiny_settings(), world, should_stop))


if __name__ == "__main__":
    main()
