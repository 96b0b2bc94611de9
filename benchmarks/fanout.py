"""Scaling of the evaluation's fan-out: one rank against two here, and a model built on measured costs for many GPUs.

    python -m benchmarks.fanout                    1 and 2 ranks of one thread on this machine, then the model
    python -m benchmarks.fanout --unit-s 60        the model with units of a minute (Stable Diffusion on a GPU)

Ranks take units from leases on shared storage, as `nd evaluate` does: real claims, real records, real files. A unit's
work is made up here (a fixed amount of arithmetic, then the record), so that the figure is the fan-out's own and not
that of a network. The model needs one measured number, the time of a unit outside its work (claim, record, mark); it
plays N ranks that do their own share and then take what others have left, with unit times that vary.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.together import answer, run_together, wait_for_start
from nd_dist.fanout.leases import LeasePool
from nd_dist.fanout.results import has_result, publish, write_staged
from nd_dist.fanout.tasks import WAIT_S, Steps, Task, work_off

SPREAD = 0.1
"""Standard deviation of unit times in the model, over their mean."""


def spend(seconds: float) -> None:
    """Compute for about so many CPU seconds: what a rank's networks would do."""
    end = time.process_time() + seconds
    matrix = torch.rand(128, 128)
    while time.process_time() < end:
        matrix = (matrix @ matrix).clamp(0, 1)


def make_tasks(folder: Path, num_units: int, unit_s: float) -> list[Task]:
    """Return units that compute, and publish a record like a judged image's."""
    features = {"features": torch.zeros(1, 8192)}

    def task(index: int) -> Task:
        place = folder / "results" / f"{index:05d}"

        def write(staging: Path) -> None:
            write_staged(staging / "features.safetensors", features)

        def work() -> Steps:
            spend(unit_s)
            yield
            publish(place, "bench", {"metrics": {"pixcorr": [0.0]}}, write)

        return Task(f"unit_{index:05d}", lambda: has_result(place, "bench"), work)

    return [task(index) for index in range(num_units)]


def run_rank(arguments: argparse.Namespace) -> None:
    """Work as one rank until every unit has a result; print what it did."""
    torch.set_num_threads(1)
    tasks = make_tasks(arguments.folder, arguments.units, arguments.work_s)
    wait_for_start()
    pool = LeasePool(arguments.folder / "leases", arguments.rank)
    wall, cpu = time.perf_counter(), time.process_time()
    tally = work_off(tasks, pool, arguments.rank, arguments.size)
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    answer({**took, "done": tally.done, "busy_s": tally.busy_s})


def measure(size: int, arguments: argparse.Namespace) -> tuple[float, list[dict[str, float]]]:
    """Return seconds until all is done, and what each of ``size`` ranks did."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "benchmarks.fanout", "--folder", folder, "--size", str(size)]
        words += ["--units", str(arguments.units), "--work-s", str(arguments.work_s)]
        commands = [[*words, "--rank", str(rank)] for rank in range(size)]
        return run_together(commands, {**os.environ, "OMP_NUM_THREADS": "1"})


def simulate(num_ranks: int, num_units: int, unit_s: float, overhead_s: float, seed: int = 0) -> float:
    """Return the seconds that N ranks need: none waits while a unit is left, and the end is noticed with a delay.

    Args:
        num_ranks: N.
        num_units: Units of all.
        unit_s: Mean seconds of a unit's work.
        overhead_s: Seconds of a claim, a record and a mark.
    """
    times = np.random.default_rng(seed).normal(1.0, SPREAD, num_units).clip(0.2) * unit_s
    free = [0.0] * num_ranks
    for work_s in times:
        heapq.heapreplace(free, free[0] + overhead_s + float(work_s))
    return max(free) + (1.25 * WAIT_S * num_ranks if num_ranks > 1 else 0.0)


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--work-s", type=float, default=0.25, help="CPU seconds of a unit here")
    parser.add_argument("--unit-s", type=float, default=20.0, help="seconds of a unit in the model")
    parser.add_argument("--model-units", type=int, default=14_000, help="units in the model (batches of images)")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--rank", "--size"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure one and two ranks in turn, then print what the model says for more."""
    arguments = parse()
    if arguments.folder is not None:
        run_rank(arguments)
        return
    seconds: dict[int, list[float]] = {1: [], 2: []}
    busiest: dict[int, list[float]] = {1: [], 2: []}
    overheads, shares = [], []
    for _ in range(arguments.rounds):
        for size, found in seconds.items():
            wall_s, answers = measure(size, arguments)
            found.append(wall_s)
            overheads += [(item["cpu_s"] - item["done"] * arguments.work_s) / item["done"] for item in answers]
            busiest[size].append(max(item["cpu_s"] for item in answers))
            shares += [item["done"] / arguments.units for item in answers] if size == 2 else []
    one, two = (float(np.median(seconds[size])) for size in (1, 2))
    busiest_one, busiest_two = (float(np.median(busiest[size])) for size in (1, 2))
    overhead_s = float(np.median(overheads))
    load = os.getloadavg()[0]
    print(f"{arguments.units} units of {arguments.work_s} CPU s, load {load:.1f}, medians of {arguments.rounds}")
    print(f"1 rank {one:.2f} s, 2 ranks {two:.2f} s: {one / two:.2f}x on the clock")
    print(f"by CPU seconds of the busiest rank, what two free cores give: {busiest_one / busiest_two:.2f}x")
    print(f"share of the units that one of two ranks did: {min(shares):.2f} to {max(shares):.2f}")
    print(f"fan-out's own cost: {1000 * overhead_s:.1f} ms of CPU a unit")
    print(f"model, {arguments.model_units} units of {arguments.unit_s:g} s (+-{100 * SPREAD:.0f} %):")
    alone = simulate(1, arguments.model_units, arguments.unit_s, overhead_s)
    for ranks in (1, 2, 8, 64, 256):
        took = simulate(ranks, arguments.model_units, arguments.unit_s, overhead_s)
        print(f"  {ranks:4} ranks {took / 3600:9.3f} h  {alone / took:7.2f}x  {100 * alone / took / ranks:6.2f} %")


if __name__ == "__main__":
    main()
