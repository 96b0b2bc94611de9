"""Extraction at Stable Diffusion 1.4's size as recipe ``paper`` packs: 64 pictures at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.support.networks import WIDTHS, make_networks
from nd_dist.chunks import OutOfMemory
from nd_dist.config import FrozenConfig
from nd_dist.frozen.extractor import FrozenExtractor
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu

PICTURES = 64
CAPTIONS = 5


class Tokenizer:
    """Gives every caption the same tokens."""

    def __call__(self, captions: Sequence[str], max_length: int, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(len(captions), max_length, dtype=torch.int64))


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(80.0) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def extractor(gpu: PretendedGpu) -> FrozenExtractor:
    sd, clip = make_networks(WIDTHS["sd14"], "cuda", torch.float32)
    with torch.device("cuda"):
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    sd.vae.to(memory_format=torch.channels_last)
    sd.unet.to("meta")  # as ``load`` leaves a part that is not run
    sd = replace(sd, text_encoder=text_encoder.requires_grad_(False).eval(), tokenizer=Tokenizer())
    return FrozenExtractor(sd, clip, FrozenConfig(batch_size=PICTURES), 42)


def extract(extractor: FrozenExtractor, *wanted: str) -> dict[str, Any]:
    pictures = np.zeros((PICTURES, 425, 425, 3), dtype=np.uint8)
    return dict(extractor.extract(pictures, [["a"] * CAPTIONS] * PICTURES, range(PICTURES), wanted))


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
