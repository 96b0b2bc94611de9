"""Randomly initialised networks of the Stable Diffusion family at several widths: shapes for timing, not pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


@dataclass(frozen=True)
class Width:
    """Sizes of the networks.

    Args:
        latent: Side of the latents.
        unet: Channels of the UNet's levels; the last level has no cross-attention.
        unet_layers: Residual blocks per level.
        heads: diffusers' ``attention_head_dim``.
        text: Tokens and width of captions.
        vae: Channels of the VAE's levels.
        vae_layers: Residual blocks per level.
        clip: Width, heads, image size and patch size of the guidance CLIP.
    """

    latent: int
    unet: tuple[int, ...]
    unet_layers: int
    heads: int
    text: tuple[int, int]
    vae: tuple[int, ...]
    vae_layers: int
    clip: tuple[int, int, int, int]


WIDTHS = {
    "toy": Width(8, (16, 32), 1, 4, (77, 24), (8, 8, 16, 16), 1, (32, 4, 224, 32)),
    "wide": Width(16, (96, 192), 1, 8, (77, 96), (32, 64, 96, 96), 1, (64, 4, 64, 8)),
    "sd14": Width(64, (320, 640, 1280, 1280), 2, 8, (77, 768), (128, 256, 512, 512), 2, (768, 12, 224, 32)),
}


def make_networks(width: Width, device: str, dtype: torch.dtype) -> tuple[StableDiffusion, ClipVision]:
    """Return frozen networks with random weights (seed 0), made on the device: full size needs no host memory."""
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae, tower = _unet(width), _vae(width), _tower(width)
    unet, vae, tower = (_frozen(network, dtype) for network in (unet, vae, tower))
    return StableDiffusion(unet, vae, SCHEDULER), ClipVision(tower)


def other_dtype(
    networks: tuple[StableDiffusion, ClipVision], dtype: torch.dtype
) -> tuple[StableDiffusion, ClipVision]:
    """Return copies of networks in another dtype."""
    sd, clip = networks
    unet, vae, tower = (_frozen(copy.deepcopy(network), dtype) for network in (sd.unet, sd.vae, clip.tower))
    return StableDiffusion(unet, vae, sd.scheduler_config), ClipVision(tower)


def _unet(width: Width) -> Any:
    levels = len(width.unet)
    return UNet2DConditionModel(
        sample_size=width.latent,
        in_channels=4,
        out_channels=4,
        layers_per_block=width.unet_layers,
        block_out_channels=width.unet,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=width.text[1],
        attention_head_dim=width.heads,
        norm_num_groups=32 if min(width.unet) % 32 == 0 else 8,
    )


def _vae(width: Width) -> Any:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=width.vae,
        layers_per_block=width.vae_layers,
        down_block_types=("DownEncoderBlock2D",) * len(width.vae),
        up_block_types=("UpDecoderBlock2D",) * len(width.vae),
        norm_num_groups=32 if min(width.vae) % 32 == 0 else 4,
        sample_size=width.latent * 2 ** (len(width.vae) - 1),
        scaling_factor=0.18215,
    )


def _tower(width: Width) -> Any:
    hidden, heads, image, patch = width.clip
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=6,
            num_attention_heads=heads,
            image_size=image,
            patch_size=patch,
            hidden_act="quick_gelu",
        )
    )


def _frozen(network: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(network.requires_grad_(False).eval(), dtype=dtype)
