"""The guided sampler at Stable Diffusion 1.4's size: steps, decoding, memory, what cannot be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.support.gpu_budget import Cost
from benchmarks.support.networks import WIDTHS, make_networks
from nd_dist.compute.chunks import OutOfMemory
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.denoiser import NoisePrediction
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions, SampleResult, StepRecord
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import Counts, PretendedGpu, pretended_gpu

ROWS = 5
PAPER = SamplerConfig(dtype="bfloat16", noise="official", uint8="truncate", num_steps=3, eta=0.5)
"""Recipe ``paper`` with one guided and one plain step."""

Networks = tuple[StableDiffusion, ClipVision]


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(80.0) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def networks(gpu: PretendedGpu) -> Networks:
    sd, clip = make_networks(WIDTHS["sd14"], "cuda", torch.bfloat16)
    for network in (sd.unet, sd.vae):
        network.to(memory_format=torch.channels_last)
    clip.features(torch.zeros(1, 3, 224, 224, device="cuda"))  # its constants come to the GPU with the first picture
    return sd, clip


def sampler_of(networks: Networks, config: SamplerConfig = PAPER) -> GuidedSampler:
    sd, clip = networks
    return GuidedSampler(sd, ClipGuidance(clip, config.layer_scale), config, torch.zeros(1, 77, 768))


def sample(sampler: GuidedSampler, rows: int, observe: Callable[[StepRecord], None] = lambda _: None) -> SampleResult:
    targets = {f"g{2 * layer:02d}": torch.ones(rows, 50, 768) for layer in range(1, 7)}
    requests = [NoiseRequest(1, repeat, 42) for repeat in range(rows)]
    options = SampleOptions(observe=observe)
    return sampler.sample(torch.ones(rows, 77, 768), torch.ones(rows, 4, 64, 64), targets, requests, options=options)


def test_steps_and_decoding_stay_within_their_budget_and_no_step_waits(
    gpu: PretendedGpu, networks: Networks, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(networks, PAPER.model_copy(update={"max_rows": ROWS}))
    predict = sampler._denoiser.predict
    found: dict[str, tuple[Counts, Cost]] = {}

    def first_predict(*arguments: Any) -> NoisePrediction:
        gpu.take()  # what comes before the steps is not a step's
        monkeypatch.setattr(sampler._denoiser, "predict", predict)
        return predict(*arguments)

    def note(record: StepRecord) -> None:
        counts = gpu.take()
        found["guided" if record.step.is_guided else "plain"] = counts, gpu.cost(counts)
        gpu.reset_peak()

    monkeypatch.setattr(sampler._denoiser, "predict", first_predict)
    result = sample(sampler, ROWS, note)
    for kind, (counts, cost) in found.items():
        assert not counts.waits, f"the host waits in a {kind} step"
        assert not counts.float64, "float64 is slow on most GPUs"
        budget.check(f"sampler: {kind} step, {ROWS} rows", cost)
    budget.check(f"sampler: decode {ROWS} pictures", gpu.cost(gpu.take()))
    assert result.images_BCHW.shape == (ROWS, 3, 512, 512)
    assert result.images_BCHW.device.type == "cpu"
    assert set(found["guided"][0].irreproducible) == {
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_flash_attention_backward",
        "convolution_backward",
        "upsample_bilinear2d_backward",
    }, "docs/gpu.md lists what may differ between two runs"
    assert not found["plain"][0].irreproducible


def test_deterministic_algorithms_leave_no_resizing_gradient_that_adds_in_any_order(
    gpu: PretendedGpu, networks: Networks
) -> None:
    _, clip = networks
    pixels = torch.zeros(2, 3, 512, 512, device="cuda", requires_grad=True)
    for is_deterministic, expected in ((False, {"upsample_bilinear2d_backward"}), (True, set())):
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            gpu.take()
            torch.autograd.grad(sum(feature.sum() for feature in clip.features(pixels)), pixels)
            found = {name for name in gpu.take().irreproducible if "upsample" in name or "index" in name}
        finally:
            torch.use_deterministic_algorithms(False)
        assert found == expected


@pytest.mark.parametrize("memory_gb", [16.0, 24.0, 40.0])
def test_the_repeats_of_an_image_are_sampled_on_smaller_cards(
    gpu: PretendedGpu, networks: Networks, memory_gb: float
) -> None:
    config = PAPER.model_copy(update={"num_steps": 2, "eta": 0.5})
    with gpu.limited(memory_gb):
        assert sample(sampler_of(networks, config), ROWS).latents_BCHW.shape == (ROWS, 4, 64, 64)
    assert not networks[0].unet.is_gradient_checkpointing, "it fits as it is"


def test_a_card_without_room_for_one_picture_ends_with_advice(gpu: PretendedGpu, networks: Networks) -> None:
    with gpu.limited(gpu.alive_bytes / 1e9 + 0.3), pytest.raises(OutOfMemory, match="bfloat16"):
        sample(sampler_of(networks), 2)
