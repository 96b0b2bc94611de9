from __future__ import annotations

import pytest
import torch

from nd_dist.diffusion.clip_guidance import WEIGHTS, ClipGuidance, layer_weights, weighted_loss
from nd_dist.diffusion.guidance import ImageEstimate, LatentGuidance, PixelGuidance
from nd_dist.errors import ConfigError, DataError
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import Inputs, make_inputs


@pytest.fixture(scope="module")
def inputs(sd: StableDiffusion, clip: ClipVision) -> Inputs:
    return make_inputs(sd, clip)


def test_weights_are_inverse_norm_shares_times_the_layer_factors() -> None:
    norms = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]])
    weights = layer_weights(norms, (1.5, 1.0, 1.0))
    torch.testing.assert_close(weights[0], torch.tensor([1.5 * 4 / 7, 2 / 7, 1 / 7]))
    torch.testing.assert_close(weights[1], torch.tensor([0.5, 1 / 3, 1 / 3]))


def test_the_loss_of_a_sample_is_the_weighted_sum_of_its_layers_mean_squares() -> None:
    features = [torch.randn(2, 5, 3), torch.randn(2, 5, 3)]
    targets = [torch.randn(2, 5, 3), torch.randn(2, 5, 3)]
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    losses = weighted_loss(features, targets, weights)
    errors = [
        [float((f[row] - t[row]).square().mean()) for f, t in zip(features, targets, strict=True)] for row in (0, 1)
    ]
    torch.testing.assert_close(losses, torch.tensor([errors[0][0] + 2 * errors[0][1], 0.5 * errors[1][0]]))


def test_losses_and_weights_of_a_sample_do_not_depend_on_its_batch(
    sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs
) -> None:
    prepared = guidance.prepare(inputs.targets)
    together = guidance.loss(ImageEstimate(inputs.z, sd.decode), prepared)
    assert together.shape == (3,)
    for row in range(3):
        alone = inputs.rows(row)
        single = guidance.prepare(alone.targets)
        torch.testing.assert_close(single[WEIGHTS][0], prepared[WEIGHTS][row])
        torch.testing.assert_close(guidance.loss(ImageEstimate(alone.z, sd.decode), single)[0], together[row])


def test_clamped_pixels_give_no_gradient() -> None:
    latents = torch.tensor([[[[-2.0, 0.0], [0.5, 3.0]]]]).expand(1, 3, 2, 2).clone().requires_grad_(True)
    ImageEstimate(latents, lambda pixels: pixels).pixels_BCHW.sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad[0, 0], torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_a_subset_of_layers_is_chosen_by_the_paper_s_names(
    sd: StableDiffusion, clip: ClipVision, inputs: Inputs
) -> None:
    some = ClipGuidance(clip, (1.0, 2.0), layers=("Linear-4", "g12"))
    prepared = some.prepare({name: inputs.targets[name] for name in ("g04", "g12")})
    assert set(prepared) == {"g04", "g12", WEIGHTS}
    assert some.loss(ImageEstimate(inputs.z, sd.decode), prepared).shape == (3,)


def test_layer_factors_must_match_the_layers(clip: ClipVision) -> None:
    with pytest.raises(ConfigError, match="layer_scale"):
        ClipGuidance(clip, (1.0, 1.0))


def test_missing_and_misshapen_targets_are_refused_by_name(guidance: ClipGuidance, inputs: Inputs) -> None:
    with pytest.raises(DataError, match="g06"):
        guidance.prepare({name: value for name, value in inputs.targets.items() if name != "g06"})
    with pytest.raises(DataError, match="g02") as caught:
        guidance.prepare({**inputs.targets, "g02": torch.zeros(3, 10, 768)})
    assert "768" in caught.value.found
    assert "16" in caught.value.expected


def test_half_precision_targets_are_widened(guidance: ClipGuidance, inputs: Inputs) -> None:
    prepared = guidance.prepare({name: value.half() for name, value in inputs.targets.items()})
    assert all(value.dtype == torch.float32 for value in prepared.values())


def test_latent_guidance_needs_no_decoder() -> None:
    def never(latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError("latent guidance must not decode")

    guidance = LatentGuidance((4, 8, 8))
    z = torch.randn(2, 4, 8, 8)
    losses = guidance.loss(ImageEstimate(z + 2.0, never), guidance.prepare({"z": z}))
    torch.testing.assert_close(losses, torch.full((2,), 4.0))


def test_pixel_guidance_compares_at_the_target_s_resolution() -> None:
    guidance = PixelGuidance(2)
    pixels = torch.full((1, 3, 8, 8), 0.5)
    target = torch.full((1, 3, 2, 2), 0.25)
    estimate = ImageEstimate(pixels * 2 - 1, lambda values: values)
    losses = guidance.loss(estimate, guidance.prepare({"pixels": target}))
    torch.testing.assert_close(losses, torch.tensor([0.0625]))
    with pytest.raises(DataError, match="pixels"):
        guidance.prepare({"pixels": torch.zeros(1, 3, 4, 4)})
