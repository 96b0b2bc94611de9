"""Decoding with the published prior at h=4096: a batch of 32 images, the way an evaluation asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.support.gpu_networks import PAPER_DECODER, make_predictor
from benchmarks.training_memory import SHAPES, VOXELS
from nd_dist.evaluation.reconstruction.decode import BATCH, DecoderFolder
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu

TARGETS = ("c", "z")  # guidance layers are c again, of 50 tokens


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(16.0) as gpu:  # the smallest card
        yield gpu


@pytest.fixture(scope="module")
def predictor(gpu: PretendedGpu) -> DecoderFolder:
    return make_predictor(TARGETS, "cuda", PAPER_DECODER)


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_stays_within_its_budget(
    gpu: PretendedGpu, predictor: DecoderFolder, budget: Budget, name: str
) -> None:
    gpu.take()
    gpu.reset_peak()
    values = predictor.predict(name, 1, np.zeros((BATCH, VOXELS[1]), dtype=np.float32), list(range(BATCH)))
    assert values.shape == (BATCH, *SHAPES[name])
    budget.check(f"decode {name}, {BATCH} images", gpu.cost(gpu.take()))
