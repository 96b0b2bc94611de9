"""Extraction at Stable Diffusion 1.4's size as recipe ``paper`` packs: 64 pictures at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.support.gpu_networks import CAPTIONS, PICTURES, extract, make_extractor
from benchmarks.support.networks import WIDTHS
from nd_dist.compute.chunks import OutOfMemory
from nd_dist.frozen.extractor import FrozenExtractor
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(80.0) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def extractor(gpu: PretendedGpu) -> FrozenExtractor:
    return make_extractor(WIDTHS["sd14"], "cuda", torch.float32, PICTURES)


@pytest.mark.parametrize(("name", "shape"), [("c", (77, 768)), ("z", (4, 64, 64)), ("g02", (50, 768))])
def test_a_batch_of_pictures_stays_within_its_budget(
    gpu: PretendedGpu, extractor: FrozenExtractor, budget: Budget, name: str, shape: tuple[int, ...]
) -> None:
    extract(extractor, name)  # constants come to the GPU once
    gpu.take()
    gpu.reset_peak()
    targets = extract(extractor, name)
    assert targets[name].shape == (PICTURES, *shape)
    counts = gpu.take()
    label = {"c": f"{CAPTIONS * PICTURES} captions", "z": f"{PICTURES} pictures", "g02": f"{PICTURES} pictures"}[name]
    budget.check(f"extract {name}, {label}", gpu.cost(counts))


@pytest.mark.parametrize("memory_gb", [16.0, 24.0, 40.0])
def test_latents_are_extracted_on_cards_that_cannot_hold_the_batch(
    gpu: PretendedGpu, extractor: FrozenExtractor, memory_gb: float
) -> None:
    own = FrozenExtractor(extractor._sd, extractor._clip, extractor._config, 42)
    with gpu.limited(memory_gb):
        assert extract(own, "z")["z"].shape == (PICTURES, 4, 64, 64)


def test_a_card_without_room_for_one_picture_ends_with_advice(gpu: PretendedGpu, extractor: FrozenExtractor) -> None:
    own = FrozenExtractor(extractor._sd, extractor._clip, extractor._config, 42)
    with gpu.limited(gpu.alive_bytes / 1e9 + 0.2), pytest.raises(OutOfMemory, match="frozen.dtype=bfloat16"):
        extract(own, "z")
