"""What one rank of the training tests runs: ``python -m tests.ranks.train_program CONFIG.json OPTIONS.json``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from nd_dist.config import Config
from nd_dist.errors import NdDistError
from nd_dist.events import EventLog
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.synthetic import SyntheticSource


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    config = Config.model_validate_json(Path(words[0]).read_text())
    options = json.loads(Path(words[1]).read_text())
    torch.set_num_threads(1)
    world = World.from_env(os.environ)
    events = EventLog(config.run_dir, world.rank, "train")
    source = SyntheticSource(world.rank, world.size, options.get("bad_step", -1), options.get("bad_rank", 0))
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == options.get("kill_at", -1) and world.rank == options.get("kill_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(calls == options.get("stop_at", -1) and world.rank == 0)

    try:
        train(config, world, source, events, should_stop)
    except NdDistError as error:
        events.write("failed", kind=type(error).__name__, exit_code=error.exit_code, message=str(error))
        return error.exit_code
    events.write("finished")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
