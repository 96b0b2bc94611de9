from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from nd_dist.diffusion.attention_guidance import (
    attention_mask,
    blur,
    blur_window,
    degrade,
    middle_attention,
    reading_attention,
)
from nd_dist.errors import CheckpointError
from nd_dist.frozen.stable_diffusion import StableDiffusion


def forward(sd: StableDiffusion, x: torch.Tensor) -> torch.Tensor:
    tokens = sd.encode_text(["a"] * len(x)).to(x.dtype)
    with torch.no_grad():
        output: torch.Tensor = sd.unet(x, torch.tensor(500), encoder_hidden_states=tokens).sample
    return output


def test_reading_attention_does_not_change_the_unet_and_is_undone(sd64: StableDiffusion) -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    plain = forward(sd64, x)
    before = middle_attention(sd64.unet).processor
    with reading_attention(sd64.unet) as reader:
        torch.testing.assert_close(forward(sd64, x), plain)
        assert reader.received_BN.shape == (2, 16)
        torch.testing.assert_close(reader.received_BN.mean(dim=1), torch.ones(2, dtype=torch.float64))
    assert middle_attention(sd64.unet).processor is before


def test_reading_is_undone_after_an_error(sd: StableDiffusion) -> None:
    before = middle_attention(sd.unet).processor
    with pytest.raises(RuntimeError, match="stop"), reading_attention(sd.unet):
        raise RuntimeError("stop")
    assert middle_attention(sd.unet).processor is before


def test_received_attention_is_that_of_diffusers_own_scores(sd64: StableDiffusion) -> None:
    attention = middle_attention(sd64.unet)
    hidden = torch.randn(3, 16, 32, dtype=torch.float64)
    with reading_attention(sd64.unet) as reader:
        attention(hidden)
    query, key = (attention.head_to_batch_dim(part(hidden)) for part in (attention.to_q, attention.to_k))
    scores = attention.get_attention_scores(query, key).unflatten(0, (3, attention.heads))
    torch.testing.assert_close(reader.received_BN, scores.mean(dim=1).sum(dim=1))


def test_the_mask_marks_positions_that_receive_more_than_their_share() -> None:
    received = torch.tensor([[1.5, 0.5, 0.9, 1.1]])
    mask = attention_mask(received, 4, 4)[0, 0]
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, expected)


def test_the_mask_fits_latents_that_are_not_square_or_even() -> None:
    assert attention_mask(torch.rand(2, 3 * 4), 6, 8).shape == (2, 1, 6, 8)
    assert attention_mask(torch.rand(2, 3 * 4), 5, 7).shape == (2, 1, 5, 7)


def test_the_blur_is_a_normalised_gaussian_reflected_at_the_border() -> None:
    flat = torch.full((1, 4, 8, 8), 3.0)
    torch.testing.assert_close(blur(flat, blur_window(4)), flat)
    point = torch.zeros(1, 4, 17, 17, dtype=torch.float64)
    point[0, 2, 8, 8] = 1.0
    spread = blur(point, blur_window(4).double())
    assert float(spread[0, [0, 1, 3]].abs().sum()) == 0.0
    ratio = spread[0, 2, 8, 9] / spread[0, 2, 8, 8]
    torch.testing.assert_close(ratio, torch.tensor(-0.5, dtype=torch.float64).exp(), rtol=1e-6, atol=0)
    assert float(spread[0, 2, 8, 13]) == 0.0
    random = torch.randn(1, 4, 8, 8)
    mirrored = F.pad(random, (4, 4, 4, 4), mode="reflect")
    torch.testing.assert_close(blur(random, blur_window(4))[0, 0, 0, 0], blur(mirrored, blur_window(4))[0, 0, 4, 4])


def test_degrading_changes_only_the_attended_positions() -> None:
    x, eps = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    received = torch.tensor([[2.0] + [0.9] * 15])
    changed = (degrade(x, eps, received, 0.4, blur_window(4)) - x).abs() > 1e-5
    assert changed[:, :, :2, :2].all()
    assert not changed[:, :, 2:].any()
    assert not changed[:, :, :, 2:].any()


def test_a_unet_without_middle_attention_is_refused_with_advice() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=24,
    )
    with pytest.raises(CheckpointError, match="sag_scale=0"):
        middle_attention(unet)
