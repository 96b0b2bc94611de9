"""Self-attention guidance (SAG): blur what the UNet attends to, and push away from what it then predicts.

Symbols: x latents (B, C, H, W); eps the noise prediction of the empty caption; abar the noise level; P the attention
probabilities of the UNet's middle block. Source: Hong et al. 2023, "Improving Sample Quality of Diffusion Models Using
Self-Attention Guidance", as the released NeuralDiffuser sampler runs it (scale 0.75).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F

from nd_dist.diffusion.schedule import signal_and_noise
from nd_dist.errors import CheckpointError

BLUR_RADIUS = 4
BLUR_SIGMA = 1.0
ATTENDED_THRESHOLD = 1.0


class AttentionReader:
    """An attention processor of diffusers that computes self-attention openly and keeps what SAG needs of it.

    ``received_BN`` is, for each of the N positions, the attention that it received from all positions, averaged over
    heads. Everywhere else in the UNet attention stays fused.
    """

    def __init__(self) -> None:
        self.received_BN = torch.empty(0)

    def __call__(
        self,
        attn: Any,  # Any: diffusers' Attention
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the self-attention of ``hidden_states`` (B, N, D)."""
        assert encoder_hidden_states is None, "the first attention of a transformer block is self-attention"
        assert attention_mask is None, "nothing is masked in latent space"
        query, key, value = (
            layer(hidden_states).reshape(*hidden_states.shape[:2], attn.heads, -1).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        wide = torch.promote_types(query.dtype, torch.float32)  # a threshold follows: half precision would flip it
        probabilities_BHNN = ((query.to(wide) * attn.scale) @ key.to(wide).transpose(-1, -2)).softmax(dim=-1)
        self.received_BN = probabilities_BHNN.detach().mean(dim=1).sum(dim=1)
        mixed = (probabilities_BHNN.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return projected


def middle_attention(unet: Any) -> Any:
    """Return the first self-attention of the UNet's middle block.

    Raises:
        CheckpointError: the UNet has none, so self-attention guidance is impossible.
    """
    blocks = getattr(getattr(unet, "mid_block", None), "attentions", None)
    try:
        return blocks[0].transformer_blocks[0].attn1  # type: ignore[index]
    except (TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            "The UNet has no self-attention in its middle block.",
            where="unet",
            found=str(getattr(unet.config, "mid_block_type", "unknown")),
            todo="use sampler.sag_scale=0 with this model",
        ) from error


@contextmanager
def reading_attention(unet: Any, reader: AttentionReader | None = None) -> Iterator[AttentionReader]:
    """Yield a reader of the middle block's self-attention; afterwards the UNet is as it was.

    Args:
        unet: diffusers' UNet.
        reader: The reader to use; a compiled UNet is compiled anew for every reader, so keep one.
    """
    attention = middle_attention(unet)
    before = attention.processor
    reader = reader or AttentionReader()
    attention.processor = reader
    try:
        yield reader
    finally:
        attention.processor = before


def attention_mask(received_BN: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return which latents are attended to, (B, 1, H, W) bool: positions that received more than 1, upsampled.

    Args:
        received_BN: Attention received by each position of the middle block's grid (mean 1 by construction).
        height, width: Size of the latents; the grid is theirs, halved (rounding up) until the count fits.
    """
    grid_height, grid_width = height, width
    while grid_height * grid_width > received_BN.shape[1]:
        grid_height, grid_width = ceil(grid_height / 2), ceil(grid_width / 2)
    assert grid_height * grid_width == received_BN.shape[1], "the middle block sees the latents, halved some times"
    attended = (received_BN > ATTENDED_THRESHOLD).to(torch.float32).reshape(-1, 1, grid_height, grid_width)
    return F.interpolate(attended, (height, width), mode="nearest") > 0.5


def blur_window(channels: int) -> torch.Tensor:
    """Return the weights of ``blur`` (channels, 1, 9, 9): a Gaussian of sigma 1."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    return torch.outer(kernel, kernel).expand(channels, 1, -1, -1)


def blur(x_BCHW: torch.Tensor, window_C1HW: torch.Tensor) -> torch.Tensor:
    """Return latents blurred by a window, reflected at the borders."""
    padded = F.pad(x_BCHW, (BLUR_RADIUS,) * 4, mode="reflect")
    return F.conv2d(padded, window_C1HW, groups=x_BCHW.shape[1])


def degrade(
    x_BCHW: torch.Tensor,
    eps_BCHW: torch.Tensor,
    received_BN: torch.Tensor,
    alpha_cumprod: float,
    window_C1HW: torch.Tensor,
) -> torch.Tensor:
    """Return latents whose clean estimate is blurred where the UNet attends, noised again with the same eps."""
    signal, noise = signal_and_noise(alpha_cumprod)
    clean = (x_BCHW - noise * eps_BCHW) / signal
    mask = attention_mask(received_BN, x_BCHW.shape[2], x_BCHW.shape[3])
    blurred = torch.where(mask, blur(clean, window_C1HW), clean)
    degraded: torch.Tensor = alpha_cumprod**0.5 * blurred + (1.0 - alpha_cumprod) ** 0.5 * eps_BCHW
    return degraded
