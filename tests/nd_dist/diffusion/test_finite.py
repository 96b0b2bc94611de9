from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.finite import NonFiniteSample
from nd_dist.diffusion.guidance import ImageEstimate
from nd_dist.diffusion.sampler import GuidedSampler, SampleResult
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import Inputs, make_inputs

CONFIG = SamplerConfig(num_steps=8, eta=0.5, kappa=3000.0)


@pytest.fixture(scope="module")
def inputs(sd: StableDiffusion, clip: ClipVision) -> Inputs:
    return make_inputs(sd, clip)


class Spoiled:
    """A guidance whose gradient is not finite for the sample whose first target value is marked."""

    MARK = 1234.0

    def __init__(self, guidance: ClipGuidance) -> None:
        self._guidance = guidance

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._guidance.prepare(targets)

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        marked = prepared["g02"][:, 0, 0] == self.MARK
        return torch.where(marked, torch.inf, 1.0) * self._guidance.loss(estimate, prepared)


def run(sd: StableDiffusion, guidance: Any, inputs: Inputs, policy: Any = "stop") -> SampleResult:
    config = CONFIG.model_copy(update={"on_non_finite": policy})
    return GuidedSampler(sd, guidance, config).sample(*inputs.arguments)


def spoil(inputs: Inputs, name: str, value: float = torch.nan) -> Inputs:
    """Return the inputs with one value of sample 1 replaced."""
    c, z = inputs.c.clone().contiguous(), inputs.z.clone().contiguous()
    targets = {key: value.clone().contiguous() for key, value in inputs.targets.items()}
    {"c": c, "z": z, **targets}[name].view(3, -1)[1, 0] = value
    return Inputs(c, z, targets, inputs.requests)


@pytest.mark.parametrize("name", ["c", "z", "g02", "g12"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_target_that_is_not_finite_stops_the_run_and_names_the_unit(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, name: str, value: float
) -> None:
    with pytest.raises(NonFiniteSample, match=f"target {name}") as caught:
        run(sd, guidance, spoil(inputs, name, value))
    assert "image 11, repeat 0" in caught.value.where


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_unit_and_timestep(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    with pytest.raises(NonFiniteSample, match=r"gradient, timestep 626") as caught:
        run(sd, Spoiled(guidance), spoil(inputs, "g02", Spoiled.MARK))
    assert "image 11" in caught.value.where


def test_a_target_of_zeros_has_no_norm_and_is_named(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    targets = {**inputs.targets, "g04": inputs.targets["g04"].clone()}
    targets["g04"][1] = 0.0
    with pytest.raises(NonFiniteSample, match="weights") as caught:
        run(sd, guidance, Inputs(inputs.c, inputs.z, targets, inputs.requests))
    assert "image 11" in caught.value.where


@pytest.mark.parametrize(("name", "what"), [("z", "target z"), ("g02", "gradient")])
def test_reported_failures_leave_the_other_samples_untouched_and_never_become_pictures(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, name: str, what: str
) -> None:
    spoiled = spoil(inputs, name, Spoiled.MARK if name == "g02" else torch.nan)
    result = run(sd, Spoiled(guidance), spoiled, policy="report")
    assert [(failure.row, failure.request.image_id, failure.what) for failure in result.failures] == [(1, 11, what)]
    assert bool(torch.isnan(result.images_BCHW[1]).all())
    whole = run(sd, guidance, inputs)
    assert whole.failures == ()
    for row in (0, 2):
        torch.testing.assert_close(result.images_BCHW[row], whole.images_BCHW[row], rtol=0, atol=1e-4)


def test_a_picture_that_overflows_in_the_decoder_is_reported(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    class Overflowing(torch.nn.Module):
        config = sd.vae.config

        def decode(self, latents: torch.Tensor) -> Any:
            decoded = sd.vae.decode(latents)
            return type(decoded)(sample=decoded.sample * torch.nan)

    broken = StableDiffusion(sd.unet, Overflowing(), sd.scheduler_config, sd.text_encoder, sd.tokenizer)
    with pytest.raises(NonFiniteSample, match="picture"):
        GuidedSampler(broken, guidance, CONFIG).sample(inputs.c, inputs.z, {}, inputs.requests, kappa=0.0)
