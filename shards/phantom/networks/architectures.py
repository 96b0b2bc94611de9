"""The phantom networks before training: which classes, how wide. One function per network; weights from a seed.

All see 64x64 pictures. The VAE's latents are 4x16x16; the CLIP vision tower has six blocks of 65 tokens, so that the
six guidance layers exist; the UNet attends to the text tokens and has a mid-block self-attention of 64 tokens.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel

from nd_dist.frozen.phantom_judges import JUDGE_KINDS, JudgeNetwork
from shards.phantom.backgrounds import PLACES, SIZE
from shards.phantom.sprites import sprites

LATENT_SIZE = SIZE // 4
MAX_TOKENS = 24
"""Length of an encoded caption, with its start and end tokens."""
TEXT_WIDTH = 128

SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""DDIM with the settings of Stable Diffusion 1.4."""


def build_vae(seed: int) -> AutoencoderKL:
    """Return an untrained VAE: (B, 3, 64, 64) in [-1, 1] <-> (B, 4, 16, 16)."""
    torch.manual_seed(seed)
    channels = (16, 32, 64)
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def build_clip(seed: int, vocab_size: int, end_token_id: int) -> CLIPModel:
    """Return an untrained CLIP.

    Args:
        seed: Seeds the initial weights.
        vocab_size: Size of the tokenizer's vocabulary.
        end_token_id: Id of ``<|endoftext|>``, at whose position the text is pooled; the tokenizer also pads with it.
    """
    torch.manual_seed(seed)
    tower = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 6, "image_size": SIZE, "patch_size": 8, "hidden_act": "quick_gelu", **tower}
    text = {
        "num_hidden_layers": 3,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": end_token_id - 1,
        "eos_token_id": end_token_id,
        "pad_token_id": end_token_id,
        **tower,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


def build_unet(seed: int) -> UNet2DConditionModel:
    """Return an untrained noise predictor: (B, 4, 16, 16), timesteps 0..999, text (B, L, 128) -> (B, 4, 16, 16)."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_judge(kind: str, seed: int) -> JudgeNetwork:
    """Return an untrained judge of one of ``JUDGE_KINDS``; every kind starts from its own seed."""
    torch.manual_seed(seed * 97 + JUDGE_KINDS.index(kind))
    return JudgeNetwork(kind, num_objects=len(sprites()), num_places=len(PLACES))
