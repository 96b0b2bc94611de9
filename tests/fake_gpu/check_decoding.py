"""Decoding with the published prior at h=4096: a batch of 32 images, the way an evaluation asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.training_memory import SHAPES, VOXELS
from nd_dist.config import DecoderConfig
from nd_dist.evaluation.reconstruction.decode import BATCH, DecoderFolder
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.training.calibration import z_statistics
from nd_dist.world import World
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu

TARGETS = ("c", "z", "g02")  # the other guidance layers are g02 again


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(16.0) as gpu:  # the smallest card
        yield gpu


@pytest.fixture(scope="module")
def predictor(gpu: PretendedGpu) -> DecoderFolder:
    folder = DecoderFolder(Path("unread"), torch.device("cuda", 0))
    with torch.device("cuda"):
        specs = [TargetSpec(name, role_of(name), SHAPES[name]) for name in TARGETS]
        folder.__dict__["_decoder"] = Decoder(DecoderConfig(heads="single"), {1: VOXELS[1]}, specs).eval()
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_stays_within_its_budget(
    gpu: PretendedGpu, predictor: DecoderFolder, budget: Budget, name: str
) -> None:
    gpu.take()
    gpu.reset_peak()
    values = predictor.predict(name, 1, np.zeros((BATCH, VOXELS[1]), dtype=np.float32), list(range(BATCH)))
    assert values.shape == (BATCH, *SHAPES[name])
    budget.check(f"decode {name}, {BATCH} images", gpu.cost(gpu.take()))


def test_statistics_of_z_are_made_on_the_device_of_the_decoder(gpu: PretendedGpu, budget: Budget) -> None:
    with torch.device("cuda"):
        decoder = Decoder(DecoderConfig(heads="single"), {1: VOXELS[1]}, [TargetSpec("z", "initial", SHAPES["z"])])
    gpu.take()
    gpu.reset_peak()
    rows = [(torch.zeros(64, VOXELS[1]), torch.zeros(64, *SHAPES["z"])) for _ in range(2)]
    with mock.patch("nd_dist.training.calibration.gather_objects", lambda value: [value]):
        found = z_statistics(decoder, 1, rows, World())
    assert found["prediction_mean"].shape == SHAPES["z"]
    budget.check("statistics of z, 128 training images", gpu.cost(gpu.take()))
