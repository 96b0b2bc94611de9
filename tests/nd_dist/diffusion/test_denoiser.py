from __future__ import annotations

from typing import Any

import pytest
import torch

from nd_dist.compute.chunks import AdaptiveChunks
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.denoiser import Conditions, Denoiser, Networks
from nd_dist.diffusion.guidance import ImageEstimate
from nd_dist.diffusion.schedule import Step, plan_steps, read_schedule, signal_and_noise
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import make_inputs

KAPPA = 2000.0


def guided_step(sd: StableDiffusion) -> Step:
    return plan_steps(read_schedule(sd.scheduler_config), 50, 0.75, 0.2).steps[2]


def conditions(sd: StableDiffusion, clip: ClipVision, guidance: ClipGuidance) -> tuple[Conditions, torch.Tensor]:
    inputs = make_inputs(sd, clip)
    empty = sd.encode_text([""]).expand(3, -1, -1)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Conditions(empty, inputs.c, guidance.prepare(inputs.targets)), x


def denoiser(sd: StableDiffusion, guidance: ClipGuidance, rows: int = 100, **config: Any) -> Denoiser:
    prediction = read_schedule(sd.scheduler_config).prediction
    return Denoiser(Networks(sd, sd, guidance), prediction, SamplerConfig(**config), AdaptiveChunks("VAE", rows))


@pytest.mark.parametrize("x0_form", ["official", "ddim"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("unet_gradient", [True, False])
@pytest.mark.parametrize("guidance_decode", ["full", "half"])
def test_the_split_gradient_is_that_of_plain_autograd(
    sd64: StableDiffusion,
    clip64: ClipVision,
    guidance64: ClipGuidance,
    x0_form: str,
    prediction: str,
    unet_gradient: bool,
    guidance_decode: str,
) -> None:
    config = {**sd64.scheduler_config, "prediction_type": prediction}
    sd = StableDiffusion(sd64.unet, sd64.vae, config, sd64.text_encoder, sd64.tokenizer)
    given, x = conditions(sd, clip64, guidance64)
    step = guided_step(sd)
    made = denoiser(sd, guidance64, x0_form=x0_form, unet_gradient=unet_gradient, guidance_decode=guidance_decode)
    split = made.predict(x, step, given, KAPPA, None)

    leaf = x.clone().requires_grad_(True)
    signal, noise = signal_and_noise(step.alpha_cumprod)
    eps = made.eps(leaf, step, given.caption_BLD)
    eps = eps if unet_gradient else eps.detach()
    factor = 1 - step.alpha_cumprod if x0_form == "official" else noise
    clean = (leaf - factor * eps) / signal
    estimate = noise * clean + (1 - noise) * leaf
    latents = estimate.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5))  # of 2 x 2 each
    decoded = sd.decode(latents if guidance_decode == "half" else estimate)
    losses = guidance64.loss(ImageEstimate(estimate, lambda _: decoded), given.prepared)
    (plain,) = torch.autograd.grad(KAPPA * losses.sum(), leaf)

    torch.testing.assert_close(split.gradient_BCHW, plain, rtol=1e-9, atol=1e-10 * float(plain.abs().max()))
    torch.testing.assert_close(split.loss_B, losses.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_chunks_of_the_vae_gradient_change_nothing(
    sd64: StableDiffusion, clip64: ClipVision, guidance64: ClipGuidance, rows: int
) -> None:
    given, x = conditions(sd64, clip64, guidance64)
    step = guided_step(sd64)
    whole = denoiser(sd64, guidance64).predict(x, step, given, KAPPA, None)
    chunked = denoiser(sd64, guidance64, rows).predict(x, step, given, KAPPA, None)
    torch.testing.assert_close(chunked.gradient_BCHW, whole.gradient_BCHW, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chunked.loss_B, whole.loss_B, rtol=1e-10, atol=0)


def test_a_guided_and_an_unguided_step_predict_the_same_noise(
    sd64: StableDiffusion, clip64: ClipVision, guidance64: ClipGuidance
) -> None:
    """The guided step runs caption and empty caption apart, the unguided one in one batch."""
    given, x = conditions(sd64, clip64, guidance64)
    step = guided_step(sd64)
    made = denoiser(sd64, guidance64)
    unguided = Step(step.index, step.timestep, step.alpha_cumprod, step.alpha_cumprod_next, is_guided=False)
    plain = made.predict(x, unguided, given, KAPPA, None)
    torch.testing.assert_close(made.predict(x, step, given, KAPPA, None).eps_BCHW, plain.eps_BCHW)
    assert float(plain.gradient_BCHW.abs().sum()) == 0.0


def test_kappa_scales_the_gradient_and_not_the_loss(
    sd64: StableDiffusion, clip64: ClipVision, guidance64: ClipGuidance
) -> None:
    given, x = conditions(sd64, clip64, guidance64)
    step, made = guided_step(sd64), denoiser(sd64, guidance64)
    once, twice = (made.predict(x, step, given, kappa, None) for kappa in (KAPPA, 2 * KAPPA))
    torch.testing.assert_close(twice.gradient_BCHW, 2 * once.gradient_BCHW)
    torch.testing.assert_close(twice.loss_B, once.loss_B)
