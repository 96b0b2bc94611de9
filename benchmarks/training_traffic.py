"""What gradients cost on the wire: large layers divided by columns against every gradient averaged, on real ranks.

    python -m benchmarks.training_traffic --ranks 2

Ranks are processes on this machine (gloo). The bytes are those of the tensors that each rank gives to collectives,
summed over a step, whoever calls them (DeepSpeed or this project); times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.support.training_data import make_data
from nd_dist.config import Config, DecoderConfig, TrainingConfig
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.world import World

COUNTED = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_to_all_single",
           "reduce_scatter_tensor")  # fmt: skip
STEPS, WARM_UP = 6, 2
QUOTA = 14


def count_bytes(counter: Counter[str]) -> None:
    """Let torch.distributed add up the bytes of what it is given, by call (a benchmark's privilege)."""
    for name in COUNTED:
        setattr(distributed, name, _counting(name, getattr(distributed, name), counter))


def _counting(name: str, call: Callable[..., Any], counter: Counter[str]) -> Callable[..., Any]:
    """Return ``call`` with its tensors' bytes added to the counter: the larger of what goes in and what comes out."""

    def counted(*words: Any, **named: Any) -> Any:
        sizes = [_num_bytes(word) for word in (*words, *named.values())]
        counter[name] += max(sizes)
        return call(*words, **named)

    return counted


def _num_bytes(value: object) -> int:
    """Return the bytes of a tensor or a list of tensors, 0 for anything else."""
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return sum(tensor.nbytes for tensor in value)
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def work(config: Config, world: World) -> dict[str, Any]:
    """Train a few steps as one rank; return bytes by call and seconds of a step."""
    counter: Counter[str] = Counter()
    count_bytes(counter)
    from launch.ranks.train import ShardSource
    from nd_dist.training.run import train

    marks: list[tuple[float, int]] = []

    def mark() -> bool:
        marks.append((time.process_time(), sum(counter.values())))
        return False

    train(config, world, ShardSource(config, world), EventLog(config.run_dir, world.rank, "train"), mark)
    steps = [e["step_s"] for e in read_events(events_path(config.run_dir, 0)) if e["event"] == "train_step"]
    deltas = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)][WARM_UP:]
    return {
        "step_s": statistics.median(steps[WARM_UP:]),
        "cpu_s": statistics.median(cpu for cpu, _ in deltas),
        "bytes": statistics.median(num_bytes for _, num_bytes in deltas),
    }


def measure(options: argparse.Namespace, folder: Path, shard_layers: bool) -> dict[str, Any]:
    """Start the ranks of one variant and return what rank 0 found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.training_traffic", "--folder", str(folder), "--hidden-size",
             str(options.hidden_size), "--only", str(int(shard_layers))]  # fmt: skip
    shared = {**os.environ, "WORLD_SIZE": str(options.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            words, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(options.ranks)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def recipe(options: argparse.Namespace, folder: Path) -> Config:
    """Return the recipe of both variants."""
    config = make_data(folder, "g02", 15_000)
    decoder = DecoderConfig(heads="single", hidden_size=options.hidden_size, prior_depth=0)
    training = TrainingConfig(
        stages=(1,), targets=("g02",), steps=(STEPS + WARM_UP, 1), samples_per_subject=(QUOTA, QUOTA),
        checkpoint_every=10**6, validate_every=10**6, mixco_fraction=0.0, zero_stage=1,
        shard_layers=bool(options.only),
    )  # fmt: skip
    return config.model_copy(update={"decoder": decoder, "training": training})


def main() -> None:
    """Measure both variants and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        config = recipe(options, options.folder)
        run_dir = options.folder / f"traffic-{options.only}-{os.environ['MASTER_PORT']}"
        found = work(config.model_copy(update={"run_dir": run_dir}), World.from_env(os.environ))
        print(json.dumps(found), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory(prefix="nd-benchmark-") as temporary:
        folder = options.folder or Path(temporary)
        recipe(options, folder)
        print(f"load {os.getloadavg()[0]:.1f}, {options.ranks} ranks, hidden width {options.hidden_size}")
        for name, shard_layers in (("every gradient averaged", False), ("large layers divided", True)):
            found = measure(options, folder, shard_layers)
            print(
                f"{name:24} {found['bytes'] / 1e6:9.2f} MB a step and rank, step {found['step_s']:.3f} s, "
                f"CPU {found['cpu_s']:.3f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
