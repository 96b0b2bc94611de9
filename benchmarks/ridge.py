"""A ridge regression of every target at NSD's true size: seconds, peak memory, bytes on disk, and whether it is right.

    python -m benchmarks.ridge                               900 images, 1,500 voxels, z and one layer: seconds
    python -m benchmarks.ridge --full --dir /data/scratch    9,000 images, 15,724 voxels, all eight targets

One rank fits made-up voxels and targets of the true shapes with all cores; the shards are left out (a target is made
when it is asked for). The same column of every target is then solved for directly; both must predict the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.support.memory import peak_memory
from benchmarks.support.shards import SUBJECT_VOXELS
from benchmarks.training_memory import SHAPES
from nd_dist.config import Config
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.models.ridge import RidgeDecoder
from nd_dist.schema import TARGETS, TargetSpec, role_of
from nd_dist.training.records import MODEL, stage_dir
from nd_dist.training.ridge import STAGE, Cost
from nd_dist.training.run import train
from nd_dist.world import World

FULL = (9_000, SUBJECT_VOXELS, TARGETS)
SMALL = (900, 1_500, ("z", "g02"))
FACTORS = 64  # what pictures differ in
NOISE = 2.0
TOLERANCE = 1e-4


class MadeUpSource:
    """Voxels and targets that share some factors, apart from noise.

    Args:
        num_images, num_voxels: N and V.
        names: Targets.
    """

    def __init__(self, num_images: int, num_voxels: int, names: Sequence[str]) -> None:
        self._num_images = num_images
        self.num_voxels = {1: num_voxels}
        self.specs = tuple(TargetSpec(name, role_of(name), SHAPES[name]) for name in names)
        self._factors_NF = np.random.default_rng(0).standard_normal((num_images, FACTORS), dtype=np.float32)

    def identity(self, request: Any) -> dict[str, object]:
        """Return nothing: there is only this one."""
        return {}

    def fit_images(self, subject: int, sessions: Any) -> list[int]:
        """Return all images."""
        return list(range(self._num_images))

    def mean_voxels(
        self,
        subject: int,
        image_ids: Any,
        sessions: Any,
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Return voxels (N, V), and three trials of each image."""
        return self._seen(99, self.num_voxels[1]), [3] * self._num_images

    def image_targets(self, name: str, image_ids: Any) -> npt.NDArray[np.float32]:
        """Return a target of all images."""
        shape = SHAPES[name]
        return self._seen(1 + TARGETS.index(name), prod(shape)).reshape(-1, *shape)

    def _seen(self, seed: int, width: int) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        rows = NOISE * rng.standard_normal((self._num_images, width), dtype=np.float32)
        rows += self._factors_NF @ (rng.standard_normal((FACTORS, width), dtype=np.float32) / np.float32(FACTORS**0.5))
        return rows


def worst_difference(source: MadeUpSource, model: Path) -> float:
    """Return the largest difference of a prediction to that of a direct solution of the same ridge problem."""
    voxels_NV, counts = source.mean_voxels(1, None, None)
    rows_NV = torch.from_numpy(voxels_NV).double()
    rows_NV -= rows_NV.mean(dim=0)
    kernel_NN = rows_NV @ rows_NV.T
    decoder, differences = RidgeDecoder.load(model), []
    for spec in source.specs:
        column = spec.numel // 2
        target_N = torch.from_numpy(source.image_targets(spec.name, None).reshape(len(counts), -1)[:, column]).double()
        damped_NN = kernel_NN + decoder.penalties[spec.name] * torch.eye(len(counts), dtype=torch.float64)
        expected_N = kernel_NN @ torch.linalg.solve(damped_NN, target_N - target_N.mean()) + target_N.mean()
        shown = slice(0, 32)
        made = decoder.predict(torch.from_numpy(voxels_NV[shown]), 1, [0] * 32, [spec.name])[spec.name]
        differences.append(float((made.flatten(1)[:, column].double() - expected_N[shown]).abs().max()))
    return float(np.max(differences))  # NaN stays NaN


def main() -> None:
    """Fit, and print what it took beside what is counted before the start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="at NSD's true size (12 GB on disk)")
    parser.add_argument("--dir", type=Path, help="for the model")
    options = parser.parse_args()
    num_images, num_voxels, names = FULL if options.full else SMALL
    source: Any = MadeUpSource(num_images, num_voxels, names)  # Any: it has what a fit asks for, and no more
    print(Cost.of(num_images, num_voxels, source.specs).describe(), flush=True)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="nd-ridge-") as name:
        training = {"training.targets": names, "training.stages": [2], "data.subjects": [1]}
        config = Config(run_dir=Path(name)).replaced({"decoder.kind": "ridge", **training})
        events, model = EventLog(config.run_dir, 0, "train"), stage_dir(config.run_dir, STAGE) / MODEL
        started, cpu = time.perf_counter(), time.process_time()
        train(config, World(), source, events, lambda: False)
        seconds, cpu_s, peak = time.perf_counter() - started, time.process_time() - cpu, peak_memory()
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        print(f"fitted in {seconds:.0f} s ({cpu_s:.0f} s of {os.cpu_count()} CPUs), load {os.getloadavg()[0]:.1f}")
        print(f"peak memory {peak / 1e9:.1f} GB, model {size / 1e9:.1f} GB")
        for event in read_events(events_path(config.run_dir, 0)):
            if event["event"] == "ridge_target":
                print(f"  {event['target']}: penalty {event['penalty']:.3g}, left-out error {event['loo_error']:.3f}")
        worst = worst_difference(source, model)
    print(f"largest difference to a direct solution: {worst:.1e}")
    if not worst <= TOLERANCE:
        sys.exit("the fit is wrong")


if __name__ == "__main__":
    main()
