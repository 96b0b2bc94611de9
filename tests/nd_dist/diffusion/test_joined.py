"""A run that goes on from another one's latents: what it inherits and what it does not."""

from __future__ import annotations

import pytest
import torch

from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.finite import PICTURE, SampleFailure
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.diffusion.samples import SampleOptions, SampleResult, StepRecord, joined
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import make_inputs

DONE = 1


def test_a_joined_result_is_that_of_the_whole_run(
    sd: StableDiffusion, clip: ClipVision, guidance: ClipGuidance
) -> None:
    inputs = make_inputs(sd, clip, num=2)
    sampler = GuidedSampler(sd, guidance, SamplerConfig(num_steps=6, kappa=3000.0))
    records: list[StepRecord] = []
    longer = sampler.sample(*inputs.arguments, eta=0.8, options=SampleOptions(None, True, records.append))
    whole = sampler.sample(*inputs.arguments, eta=0.25, options=SampleOptions(intermediates=True))
    resume = (DONE, records[DONE - 1].latents_BCHW)
    options = SampleOptions(intermediates=True, resume=resume)
    later = sampler.sample(*inputs.arguments, eta=0.25, options=options)
    made = joined(longer, later, sampler.plan(eta=0.25).steps, DONE)
    for name in ("images_BCHW", "latents_BCHW", "losses_GB", "intermediates_TBCHW"):
        assert torch.equal(getattr(made, name), getattr(whole, name)), name
    assert made.failures == ()


@pytest.mark.parametrize(
    ("what", "timestep", "is_inherited"),
    [("target g02", -1, True), ("gradient", 499, True), ("latent", 333, False), (PICTURE, -1, False)],
)
def test_failures_of_shared_steps_are_inherited_and_later_ones_are_not(
    sd: StableDiffusion, guidance: ClipGuidance, what: str, timestep: int, is_inherited: bool
) -> None:
    steps = GuidedSampler(sd, guidance, SamplerConfig(num_steps=6)).plan(3000.0, 0.25).steps
    assert [step.timestep for step in steps] == [499, 333, 167, 1]
    request = NoiseRequest(3, 1, 0)

    def result(*failures: SampleFailure) -> SampleResult:
        images = torch.zeros(2, 3, 4, 4)
        return SampleResult(images, torch.zeros(2, 4, 1, 1), torch.zeros(1, 2), images[:0, None], failures)

    made = joined(result(SampleFailure(1, request, what, timestep)), result(), steps, DONE)
    assert [failure.what for failure in made.failures] == ([what] if is_inherited else [])
    assert bool(torch.isnan(made.images_BCHW[1]).all()) is is_inherited
    assert not torch.isnan(made.images_BCHW[0]).any()
