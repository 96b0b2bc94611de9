"""The upsampler of the latent head: the decoder half of Stable Diffusion's VAE, small enough to be written out.

Computes what diffusers' ``vae.Decoder`` computes (the published upsampler), with its state-dict keys; a test compares
the two. Written here because importing diffusers costs every training rank more than torch and DeepSpeed together.

Legend of shape suffixes: B samples, C channels, H W height and width of a map, N = H W positions.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

MAX_GROUPS = 32
NORM_EPS = 1e-6
BLOCKS_PER_LEVEL = 2


class ResnetBlock(nn.Module):
    """``x + conv(SiLU(norm(conv(SiLU(norm(x))))))``, with a 1x1 convolution on x where the channels change.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        groups: Groups of the norms.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, channels_out, H, W)."""
        update_BCHW: torch.Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))
        return update_BCHW + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class MapAttention(nn.Module):
    """Self-attention over all positions of a map, one head, added to its input.

    Args:
        channels: Channels of the map.
        groups: Groups of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape."""
        y_BNC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        mixed_BNC = F.scaled_dot_product_attention(self.to_q(y_BNC), self.to_k(y_BNC), self.to_v(y_BNC))
        update_BCHW: torch.Tensor = self.to_out[0](mixed_BNC).transpose(1, 2).reshape(x_BCHW.shape)
        return x_BCHW + update_BCHW


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution.

    Args:
        channels: Channels of the map.
        groups: Groups of the norms.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MapAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape."""
        out_BCHW: torch.Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x_BCHW)))
        return out_BCHW


class Doubling(nn.Module):
    """Nearest-neighbour doubling of height and width, then a convolution.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, C, 2 H, 2 W)."""
        out_BCHW: torch.Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out_BCHW


class UpBlock(nn.Module):
    """Residual blocks at one resolution, then the doubling to the next.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        groups: Groups of the norms.
        is_last: Whether this is the final resolution (no doubling).
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int, is_last: bool) -> None:
        super().__init__()
        inputs = [channels_in] + [channels_out] * (BLOCKS_PER_LEVEL - 1)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels_out, groups) for channels in inputs)
        self.upsamplers = nn.ModuleList([] if is_last else [Doubling(channels_out)])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, channels_out, 2 H, 2 W), or H x W at the last level."""
        for block in [*self.resnets, *self.upsamplers]:
            x_BCHW = block(x_BCHW)
        return x_BCHW


class Upsampler(nn.Module):
    """From a small feature map to the latent.

    Args:
        channels_in: Channels of the feature map.
        channels_out: Channels of the latent.
        channels: Channels of the levels, finest first; every level but the finest doubles the resolution.

    Source: diffusers' AutoencoderKL decoder with one layer per block; groups are 32, or the largest common divisor of
        32 and all channels where they are fewer.
    """

    def __init__(self, channels_in: int, channels_out: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        groups, coarsest_first = gcd(MAX_GROUPS, *channels), channels[::-1]
        self.conv_in = nn.Conv2d(channels_in, coarsest_first[0], 3, padding=1)
        self.mid_block = MiddleBlock(coarsest_first[0], groups)
        before = (coarsest_first[0], *coarsest_first[:-1])
        self.up_blocks = nn.ModuleList(
            UpBlock(before[i], width, groups, is_last=i == len(channels) - 1) for i, width in enumerate(coarsest_first)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], channels_out, 3, padding=1)

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the latent."""
        x_BCHW = self.mid_block(self.conv_in(map_BCHW))
        for block in self.up_blocks:
            x_BCHW = block(x_BCHW)
        latent_BCHW: torch.Tensor = self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))
        return latent_BCHW
