from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nd_dist.config import SamplerConfig
from nd_dist.diffusion.attention_guidance import AttentionReader
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.guidance import LatentGuidance, PixelGuidance
from nd_dist.diffusion.noise import NoiseRequest, draw_noise
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions, StepRecord
from nd_dist.errors import ConfigError, DataError
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.reference import Reference
from tests.nd_dist.diffusion.support.toy_inputs import LAYER_SCALE, Inputs, make_inputs

SHORT: dict[str, Any] = {"num_steps": 6, "eta": 0.5, "kappa": 3000.0}
"""Four of six steps are run, two of them guided: every branch of the loop in little time."""


@pytest.fixture(scope="module")
def inputs(sd: StableDiffusion, clip: ClipVision) -> Inputs:
    return make_inputs(sd, clip)


@pytest.fixture(scope="module")
def inputs64(sd64: StableDiffusion, clip64: ClipVision) -> Inputs:
    return make_inputs(sd64, clip64)


def sampler(sd: StableDiffusion, guidance: Any, **config: Any) -> GuidedSampler:
    return GuidedSampler(sd, guidance, SamplerConfig(**{**SHORT, **config}))


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"x0_form": "ddim"},
        {"noise_timestep": "first_step"},
        {"unet_gradient": False},
        {"sag_scale": 0.0},
        {"cfg_scale": 3.0, "layer_scale": (1.0, 0.0, 2.0, 1.0, 1.0, 0.5)},
        {"strength": 1.0, "eta": 1.0},
        {"kappa": 0.0},
    ],
    ids=str,
)
def test_a_batch_equals_the_published_procedure_run_one_by_one(
    sd64: StableDiffusion, clip64: ClipVision, inputs64: Inputs, switches: dict[str, Any]
) -> None:
    config = SamplerConfig(**{**SHORT, **switches})
    made = GuidedSampler(sd64, ClipGuidance(clip64, config.layer_scale), config)
    pair = inputs64.rows(0, 2)
    result = made.sample(*pair.arguments)
    reference = Reference(
        sd64,
        clip64,
        sd64.scheduler_config,
        config.kappa,
        config.eta,
        cfg=config.cfg_scale,
        sag=config.sag_scale,
        x0_form=config.x0_form,
        noise_timestep=config.noise_timestep,
        unet_gradient=config.unet_gradient,
        layer_scale=config.layer_scale,
        num_steps=config.num_steps,
        strength=config.strength,
    )
    if config.strength == 1.0:  # the published procedure would index a timestep that does not exist
        reference = Reference(**{**vars(reference), "noise_timestep": "last"})
    noise = draw_noise(pair.requests, sd64.latent_shape).double()
    empty = sd64.encode_text([""])
    for row in range(2):
        targets = {name: values[row : row + 1].double() for name, values in pair.targets.items()}
        z = pair.z[row : row + 1].double()
        picture, latent = reference.run(pair.c[row : row + 1], empty, z, noise[row : row + 1], targets)
        scale = float(latent.abs().max())
        torch.testing.assert_close(result.latents_BCHW[row], latent[0].detach(), rtol=0, atol=2e-6 * scale)
        torch.testing.assert_close(result.images_BCHW[row].double(), picture[0].detach(), rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_the_batch_it_rides_in(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    made = sampler(sd, guidance)
    together = made.sample(*inputs.arguments)
    turned = made.sample(*inputs.rows(2, 1, 0).arguments)
    for row in range(3):
        alone = made.sample(*inputs.rows(row).arguments)
        scale = float(alone.latents_BCHW.abs().max())
        for other in (together.latents_BCHW[row], turned.latents_BCHW[2 - row]):
            torch.testing.assert_close(other, alone.latents_BCHW[0], rtol=0, atol=2e-5 * scale)
        torch.testing.assert_close(together.losses_GB[:, row], alone.losses_GB[:, 0], rtol=1e-4, atol=0)


def test_the_same_call_gives_the_same_bits(sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs) -> None:
    first, second = (sampler(sd, guidance).sample(*inputs.arguments) for _ in range(2))
    assert torch.equal(first.images_BCHW, second.images_BCHW)


def test_kappa_zero_eta_zero_and_no_targets_are_exactly_unguided(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    made = sampler(sd, guidance)
    by_kappa = made.sample(*inputs.arguments, kappa=0.0, eta=1.0)
    by_eta = made.sample(*inputs.arguments, kappa=3000.0, eta=0.0)
    unguided = made.sample(inputs.c, inputs.z, {}, inputs.requests, kappa=0.0)
    assert torch.equal(by_kappa.images_BCHW, by_eta.images_BCHW)
    assert torch.equal(by_kappa.latents_BCHW, unguided.latents_BCHW)
    assert by_kappa.losses_GB.shape == (0, 3)
    guided = made.sample(*inputs.arguments)
    assert not torch.allclose(guided.latents_BCHW, unguided.latents_BCHW, atol=1e-3)


def test_kappa_and_eta_of_a_call_replace_the_configured_ones(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    called = sampler(sd, guidance).sample(*inputs.arguments, kappa=500.0, eta=1.0)
    configured = sampler(sd, guidance, kappa=500.0, eta=1.0).sample(*inputs.arguments)
    assert torch.equal(called.latents_BCHW, configured.latents_BCHW)
    assert called.losses_GB.shape == (4, 3)


def test_guidance_lowers_its_own_loss(sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs) -> None:
    made = sampler(sd, guidance, eta=1.0)
    weak = made.sample(*inputs.arguments, kappa=1e-6).losses_GB
    strong = made.sample(*inputs.arguments, kappa=3000.0).losses_GB
    assert bool((strong[-1] < weak[-1]).all())


def test_repeats_of_an_image_differ_and_official_noise_is_shared_by_images(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    picked = inputs.rows(0, 0, 1)
    requests = [NoiseRequest(10, 0, 0), NoiseRequest(10, 1, 0), NoiseRequest(11, 0, 0)]
    started: list[torch.Tensor] = []
    for kind in ("per_image", "official"):
        made = sampler(sd, guidance, noise=kind, kappa=0.0)
        made.sample(picked.c, picked.z, {}, requests)
        started.append(draw_noise(requests, sd.latent_shape, kind))  # type: ignore[arg-type]
    per_image, official = started
    assert not torch.equal(per_image[0], per_image[2])
    assert torch.equal(official[0], official[2])
    own = sampler(sd, guidance, noise="official", kappa=0.0).sample(picked.c, picked.z, {}, requests)
    given = sampler(sd, guidance, kappa=0.0).sample(
        picked.c, picked.z, {}, requests, options=SampleOptions(noise_BCHW=official)
    )
    assert torch.equal(own.latents_BCHW, given.latents_BCHW)
    assert not torch.allclose(own.images_BCHW[0], own.images_BCHW[1], atol=1e-3)


def test_intermediate_pictures_are_the_decoded_latents_of_every_step(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    records: list[StepRecord] = []
    options = SampleOptions(intermediates=True, observe=records.append)
    result = sampler(sd, guidance).sample(*inputs.arguments, options=options)
    assert result.intermediates_TBCHW.shape == (4, 3, 3, 32, 32)
    assert torch.equal(result.intermediates_TBCHW[-1], result.images_BCHW)
    assert [record.step.index for record in records] == list(range(4))
    assert torch.equal(records[-1].latents_BCHW, result.latents_BCHW)
    plain = sampler(sd, guidance).sample(*inputs.arguments)
    assert plain.intermediates_TBCHW.shape[0] == 0
    assert torch.equal(plain.images_BCHW, result.images_BCHW)


def test_a_folder_of_the_second_version_works_unchanged(v_prediction_dir: Path, clip64: ClipVision) -> None:
    other = stable_diffusion.load(v_prediction_dir, dtype=torch.float64)
    given = make_inputs(other, clip64, num=1)
    config = SamplerConfig(**SHORT)
    result = GuidedSampler(other, ClipGuidance(clip64, config.layer_scale), config).sample(*given.arguments)
    assert result.images_BCHW.shape == (1, 3, 48, 48)
    reference = Reference(other, clip64, other.scheduler_config, config.kappa, config.eta, num_steps=6)
    noise = draw_noise(given.requests, other.latent_shape).double()
    targets = {name: values.double() for name, values in given.targets.items()}
    _, latent = reference.run(given.c, other.encode_text([""]), given.z.double(), noise, targets)
    scale = float(latent.abs().max())
    torch.testing.assert_close(result.latents_BCHW, latent.detach(), rtol=0, atol=2e-6 * scale)


def test_other_kinds_of_guidance_need_no_change_of_the_sampler(sd: StableDiffusion, inputs: Inputs) -> None:
    unguided = sampler(sd, LatentGuidance(sd.latent_shape)).sample(*inputs.arguments, kappa=0.0)
    goal = torch.full_like(inputs.z, 0.5)
    towards = sampler(sd, LatentGuidance(sd.latent_shape), eta=1.0, kappa=500.0).sample(
        inputs.c, inputs.z, {"z": goal}, inputs.requests
    )
    before, after = ((made.latents_BCHW - goal).square().mean() for made in (unguided, towards))
    assert after < before
    white = {"pixels": torch.ones(3, 3, 2, 2)}
    bright = sampler(sd, PixelGuidance(2), eta=1.0, kappa=10000.0).sample(inputs.c, inputs.z, white, inputs.requests)
    assert bright.images_BCHW.mean() > unguided.images_BCHW.mean() + 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_keep_latents_in_float32(
    sd_dir: Path, clip_dir: Path, guidance: ClipGuidance, inputs: Inputs, sd: StableDiffusion, dtype: torch.dtype
) -> None:
    half_guidance = ClipGuidance(clip_vision.load(clip_dir, dtype=dtype), LAYER_SCALE)
    half = sampler(stable_diffusion.load(sd_dir, dtype=dtype), half_guidance)
    result = half.sample(*inputs.arguments)
    assert result.latents_BCHW.dtype == torch.float32
    full = sampler(sd, guidance).sample(*inputs.arguments)
    error = (result.latents_BCHW - full.latents_BCHW).abs().mean() / full.latents_BCHW.abs().mean()
    assert error < 0.1


def test_targets_of_another_model_are_refused_with_both_shapes(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    made = sampler(sd, guidance)
    wrong_text = torch.zeros(3, 12, 768)
    with pytest.raises(DataError, match="Target c") as caught:
        made.sample(wrong_text, inputs.z, inputs.targets, inputs.requests)
    assert "24" in caught.value.expected
    assert "768" in caught.value.found
    with pytest.raises(DataError, match="Target z"):
        made.sample(inputs.c, torch.zeros(3, 4, 64, 64), inputs.targets, inputs.requests)
    with pytest.raises(DataError, match="Target g02"):
        made.sample(inputs.c, inputs.z, {**inputs.targets, "g02": inputs.targets["g02"][:2]}, inputs.requests)


def test_a_guided_run_without_targets_or_requests_is_refused(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    with pytest.raises(DataError, match="g02"):
        sampler(sd, guidance).sample(inputs.c, inputs.z, {}, inputs.requests)
    with pytest.raises(DataError, match="No reconstruction"):
        sampler(sd, guidance).sample(inputs.c[:0], inputs.z[:0], {}, [])


def test_the_attention_of_the_unet_is_left_as_it_was(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    before = {name: type(processor) for name, processor in sd.unet.attn_processors.items()}
    sampler(sd, guidance).sample(*inputs.arguments)
    assert {name: type(processor) for name, processor in sd.unet.attn_processors.items()} == before


@pytest.mark.parametrize("how", [True, "cuda-graphs"])
def test_a_compiled_sampler_leaves_networks_and_pictures_as_they_are(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, how: bool | str
) -> None:
    plain = sampler(sd, guidance).sample(*inputs.arguments)
    with torch.compiler.set_stance("force_eager"):  # everything but the minutes of compilation
        made = sampler(sd, guidance, compile=how).sample(*inputs.arguments)
    assert torch.equal(made.images_BCHW, plain.images_BCHW)
    assert torch.equal(sampler(sd, guidance).sample(*inputs.arguments).images_BCHW, plain.images_BCHW)


class Overwriting:
    """Does to a UNet's outputs what CUDA graphs do: a pass overwrites what the one before gave."""

    def __init__(self, unet: Any) -> None:
        self._unet, self._given = unet, list[torch.Tensor]()
        self.reader: AttentionReader | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        arguments = tuple(torch.clone(argument) for argument in arguments)
        for given in self._given:
            given.fill_(torch.nan)
        output = self._unet(*arguments, **options)
        assert self.reader is not None
        self._given = [output.sample, self.reader.received_BN]
        return output


@pytest.mark.parametrize("unet_gradient", [True, False])
def test_no_step_needs_what_the_next_pass_of_a_cuda_graph_overwrites(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, unet_gradient: bool
) -> None:
    own = {"sag_scale": 0.75, "unet_gradient": unet_gradient}
    plain = sampler(sd, guidance, **own).sample(*inputs.arguments)
    unet = Overwriting(sd.unet)
    monkeypatch.setattr(StableDiffusion, "compiled", lambda self, _: dataclasses.replace(self, unet=unet))
    graphs = sampler(sd, guidance, compile="cuda-graphs", **own)
    unet.reader = graphs._reader
    assert torch.equal(graphs.sample(*inputs.arguments).images_BCHW, plain.images_BCHW)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_sampler_that_is_to_draw_on_a_gpu_says_that_there_is_none(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    with pytest.raises(ConfigError, match="noise_device"):
        sampler(sd, guidance, noise_device="cuda").sample(*inputs.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, "cuda-graphs"])
def test_compiled_passes_change_pictures_by_rounding_only(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, how: bool | str
) -> None:
    given = inputs.rows(0)
    plain = sampler(sd, guidance).sample(*given.arguments)
    made = sampler(sd, guidance, compile=how).sample(*given.arguments)
    scale = float(plain.latents_BCHW.abs().max())
    torch.testing.assert_close(made.latents_BCHW, plain.latents_BCHW, rtol=0, atol=1e-4 * scale)
