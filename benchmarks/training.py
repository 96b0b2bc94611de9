"""Training against a plain loop that works like the released one: samples per second, data wait, peak memory.

    python -m benchmarks.training                            hidden width 1024, target g02, this machine's device
    python -m benchmarks.training --target z                 the latent decoder
    python -m benchmarks.training --prior-depth 6            with the published prior (on a CPU: minutes a step)
    python -m benchmarks.training --hidden-size 4096 --dtype bfloat16       on a GPU

Every line of the table is a process of its own on the same made-up data (published voxel counts and target shape), in
turn, round after round; times are medians over all timed steps (on a busy machine believe the processor's). The plain
loop keeps the betas of NSD's number of trials in memory (the made-up ones repeated) and makes an epoch's batches
first: its samples per second count that, shared over the epoch's steps; `data wait` is the share of time spent on it.
Between plain and nd_dist stand lines that differ in one thing each: where the gain comes from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.support.released_loop import ReleasedLoop
from benchmarks.support.shards import SHAPES
from benchmarks.support.training_data import make_data
from nd_dist.config import Config, DecoderConfig, TrainingConfig
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.training.run import train
from nd_dist.world import World

QUOTA = 14
VOXELS = 15_000
WARM_UP = 3
UNTOLD = 2  # the training ends before its last step, and the losses of a step are read one step later
VARIANTS: dict[str, Mapping[str, bool]] = {
    "plain": {"computes_mixer": True, "is_fused": False},
    "plain, no mixer": {"computes_mixer": False, "is_fused": False},
    "plain, no mixer, fused": {"computes_mixer": False, "is_fused": True},
    "nd_dist, replicated": {"shard_layers": False},
    "nd_dist": {"shard_layers": True},
}


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Args:
        step_s, step_cpu_s: Seconds of each timed step, by the clock and of the processor (all threads).
        wait: Share of the time spent waiting for data.
        peak_bytes: Peak resident memory of the process; on a GPU its peak allocation is in ``gpu_bytes``.
        gpu_bytes: Peak GPU memory, 0 without one.
        overhead_s, overhead_cpu_s: Seconds per step that are not among those (an epoch made in advance).
    """

    step_s: list[float]
    step_cpu_s: list[float]
    wait: float
    peak_bytes: int
    gpu_bytes: int
    overhead_s: float = 0.0
    overhead_cpu_s: float = 0.0


def recipe(options: argparse.Namespace, folder: Path) -> Config:
    """Return the recipe of both sides."""
    config = make_data(folder, options.target, options.voxels)
    decoder = DecoderConfig(heads="single", hidden_size=options.hidden_size, prior_depth=options.prior_depth)
    training = TrainingConfig(
        stages=(1,),
        targets=(options.target,),
        steps=(options.steps + WARM_UP + UNTOLD, 1),
        samples_per_subject=(QUOTA, QUOTA),
        checkpoint_every=10**6,
        validate_every=10**6,
        mixco_fraction=1.0,
        zero_stage=1,
        dtype=options.dtype,
    )
    return config.model_copy(update={"decoder": decoder, "training": training})


def measure(variant: str, options: argparse.Namespace, folder: Path) -> Measured:
    """Measure one variant in this process."""
    config, settings = recipe(options, folder), VARIANTS[variant]
    if variant.startswith("plain"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loop = ReleasedLoop(config, device, settings["computes_mixer"], settings["is_fused"], options.trials)
        done = loop.run(options.epoch_steps, options.steps + WARM_UP)
        steps, cpu_steps = done.step_s[WARM_UP:], done.step_cpu_s[WARM_UP:]
        overhead, cpu_overhead = (s / options.epoch_steps for s in (done.epoch_s, done.epoch_cpu_s))
        wait = overhead / (overhead + statistics.median(steps))
        return Measured(steps, cpu_steps, wait, peak_bytes(), gpu_bytes(), overhead, cpu_overhead)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        training = config.training.model_copy(update=settings)
        return _measure_own(config.model_copy(update={"training": training, "run_dir": Path(run_dir)}))


def _measure_own(config: Config) -> Measured:
    """Measure the real trainer through its events; it stops (and writes nothing) after the timed steps."""
    from launch.ranks.train import ShardSource

    cpu_times: list[float] = []

    def leave() -> bool:
        cpu_times.append(time.process_time())
        if len(cpu_times) == config.training.steps[0]:  # before the last step: after it comes the export
            raise _EnoughError
        return False

    with contextlib.suppress(_EnoughError):
        train(config, World(), ShardSource(config, World()), EventLog(config.run_dir, 0, "train"), leave)
    steps = [e for e in read_events(events_path(config.run_dir, 0)) if e["event"] == "train_step"][WARM_UP:]
    waits = [step["data_wait_share"] * step["step_s"] for step in steps]
    seconds = [step["step_s"] for step in steps]
    cpu_seconds = [b - a for a, b in pairwise(cpu_times)][WARM_UP:]
    return Measured(seconds, cpu_seconds, sum(waits) / sum(seconds), peak_bytes(), gpu_bytes())


class _EnoughError(Exception):
    """Ends a training after its timed steps."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_bytes() -> int:
    """Return the peak GPU memory of this process."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def _measure_apart(variant: str, words: list[str], folder: Path) -> Measured:
    """Measure a variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", *words, "--folder", str(folder), "--only", variant]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def print_table(found: Mapping[str, list[Measured]], rows: int) -> None:
    """Print a line per variant, with ratios to the first one."""
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} thread(s), batch {rows}")
    print(
        f"{'':24} {'samples/s':>10} {'ratio':>6} {'a CPU s':>8} {'ratio':>6} {'data wait':>10} {'GB':>6} {'ratio':>6}"
    )
    first: tuple[float, float, float] | None = None
    for variant, runs in found.items():
        speed = rows / (statistics.median(s for run in runs for s in run.step_s) + runs[0].overhead_s)
        cpu_speed = rows / (statistics.median(s for run in runs for s in run.step_cpu_s) + runs[0].overhead_cpu_s)
        peak = max(run.gpu_bytes or run.peak_bytes for run in runs) / 1e9
        first = first or (speed, cpu_speed, peak)
        wait = statistics.median(run.wait for run in runs)
        print(
            f"{variant:24} {speed:10.1f} {speed / first[0]:6.2f} {cpu_speed:8.1f} {cpu_speed / first[1]:6.2f} "
            f"{wait:10.2%} {peak:6.2f} {first[2] / peak:6.2f}",
            flush=True,
        )


def main() -> None:
    """Measure every variant in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(SHAPES), default="g02")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--prior-depth", type=int, default=0)
    parser.add_argument("--voxels", type=int, default=VOXELS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epoch-steps", type=int, default=714, help="the plain loop keeps so many steps in memory")
    parser.add_argument(
        "--trials", type=int, default=27_000, help="the plain loop keeps so many of a subject in memory"
    )
    parser.add_argument("--folder", type=Path, help="keep the made-up data here (default: made anew)")
    parser.add_argument("--only", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.only:
        print(json.dumps(vars(measure(options.only, options, options.folder))))
        return
    with tempfile.TemporaryDirectory(prefix="nd-benchmark-") as temporary:
        folder = options.folder or Path(temporary)
        recipe(options, folder)
        found: dict[str, list[Measured]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.rounds):
            for variant in VARIANTS:
                found[variant].append(_measure_apart(variant, sys.argv[1:], folder))
        print_table(found, QUOTA * 3)


if __name__ == "__main__":
    main()
