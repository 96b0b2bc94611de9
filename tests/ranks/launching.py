"""Starts the ranks of a training test as real processes and reads what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nd_dist.config import Config
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.training.run import train
from nd_dist.world import World
from tests.ranks.synthetic import SyntheticSource
from tests.support.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.ranks.train_program"


def write_job(path: Path, config: Config, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": config.model_dump(mode="json"), "options": options}))
    return path


def train_alone(configs: Iterable[Config]) -> None:
    """Train recipes in this process, a world of one, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for config in configs:
        train(config, World(), SyntheticSource(), EventLog(config.run_dir, 0, "train"), lambda: False)
    torch.set_num_threads(threads)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**plain, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **more}


def run_with_deepspeed(num_ranks: int, *jobs: Path) -> subprocess.CompletedProcess[str]:
    """Run jobs under the real ``deepspeed`` launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks)]
    where = ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", MODULE]
    return subprocess.run(
        [*launcher, *where, *map(str, jobs)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip


def run_ranks(num_ranks: int, *jobs: Path) -> list[int]:
    """Run jobs on ranks that are started here (a second cheaper than the launcher); return the exit codes."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, *map(str, jobs)],
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(num_ranks)
    ]
    try:
        return [process.wait(HANG_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def events_of(config: Config, rank: int = 0) -> list[dict[str, Any]]:
    return list(read_events(events_path(config.run_dir, rank)))


def losses_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    return {(e["stage"], e["step"]): e["loss"] for e in events if e["event"] == "train_step"}
