"""The toy evaluation with a decoder that takes its time over every target."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from launch.ranks.rank import Rank
from nd_dist.comm import connect
from nd_dist.evaluation.reconstruction.decode import Predictor
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.run import evaluate
from tests.nd_dist.evaluation.toy_world import ToySource, toy_job

TARGET_S = 1.2
NUM_IMAGES = 70  # three batches


class Slow:
    """A predictor that sleeps before it predicts; while it lives only the evaluation itself gives signs of life."""

    def __init__(self, predictor: Predictor, signs: threading.Event) -> None:
        self._predictor, self._signs = predictor, signs

    @property
    def names(self) -> tuple[str, ...]:
        self._signs.clear()
        return self._predictor.names

    def predict(
        self, name: str, subject: int, voxels_BV: npt.NDArray[np.float32], seeds: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        time.sleep(TARGET_S)
        return self._predictor.predict(name, subject, voxels_BV, seeds)

    def __del__(self) -> None:
        self._signs.set()


def evaluate_slowly(rank: Rank, signs: threading.Event) -> None:
    """Evaluate two images after decoding all of them; ``signs`` is clear while the decoder lives."""

    class SlowFolders(Networks):
        def decoder(self, folder: Path) -> Predictor:
            return Slow(super().decoder(folder), signs)

    torch.set_num_threads(1)
    job = toy_job(rank.config.run_dir.parent, num_images=2)
    config = job.config.model_copy(update={"launch": rank.config.launch, "run_dir": rank.config.run_dir})
    networks = SlowFolders(config, rank.use_device())
    job = replace(job, config=config, networks=networks, source=ToySource(NUM_IMAGES))
    evaluate(job, connect(rank.world), rank.events, rank.should_stop)
