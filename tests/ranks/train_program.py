"""What one rank of the training tests runs: ``python -m tests.ranks.train_program JOB.json [JOB.json ...]``.

A job is ``{"config": {...}, "options": {...}}``; jobs run one after the other in the same processes. Options:
``kill_at`` / ``kill_rank`` (SIGKILL itself at that step), ``bad_step`` / ``bad_rank`` (NaN in the data).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from nd_dist.config import Config
from nd_dist.errors import NdDistError
from nd_dist.events import EventLog
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.synthetic import SyntheticSource


def run_job(world: World, job: dict[str, Any]) -> int:
    config, options = Config.model_validate(job["config"]), job["options"]
    events = EventLog(config.run_dir, world.rank, "train")
    source = SyntheticSource(world.rank, world.size, options.get("bad_step", -1), options.get("bad_rank", 0))
    calls = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == options.get("kill_at", -1) and world.rank == options["kill_rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    try:
        train(config, world, source, events, should_stop)
    except NdDistError as error:
        events.write("failed", kind=type(error).__name__, message=str(error))
        return error.exit_code
    events.write("finished", group_timeouts_s=group_timeouts())
    return 0


def group_timeouts() -> list[float]:
    """Time-outs of all process groups in seconds (gloo keeps them in its options)."""
    cpu = torch.device("cpu")
    return [pg._get_backend(cpu).options._timeout.total_seconds() for pg in distributed_c10d._world.pg_map]


def main() -> int:
    torch.set_num_threads(1)
    world = World.from_env(os.environ)
    paths = [Path(word) for word in sys.argv[1:] if word.endswith(".json")]  # deepspeed adds --local_rank
    return max(run_job(world, json.loads(path.read_text())) for path in paths)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
