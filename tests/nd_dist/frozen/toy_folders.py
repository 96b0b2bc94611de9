"""Tiny but complete model folders in Hugging Face layout, written with the real classes; weights are random."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

from nd_dist.files import hash_json, sha256_file

TEXT_WIDTH = 24
TEXT_LENGTH = 12
PICTURE_SIZE = 32
CLIP_SIZE = 24
CLIP_WIDTH = 16

SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


SECOND_VERSION: dict[str, Any] = {"use_linear_projection": True, "attention_head_dim": (2, 4), "sample_size": 12}
"""How the UNet of Stable Diffusion 2.1 differs from that of 1.4, at toy width."""


def toy_unet(text_width: int = TEXT_WIDTH, **options: Any) -> Any:
    torch.manual_seed(1)
    plain = {"sample_size": 8, "attention_head_dim": 4}
    return UNet2DConditionModel(
        **{**plain, **options},
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        norm_num_groups=8,
    )


def toy_vae() -> Any:
    torch.manual_seed(2)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=PICTURE_SIZE,
        scaling_factor=0.18215,
    )


def toy_text_encoder(width: int = TEXT_WIDTH) -> Any:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def toy_clip_tower(num_layers: int = 8) -> Any:
    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=CLIP_SIZE,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    return CLIPVisionModel(config)


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    pieces += [f"{letter}</w>" for letter in string.ascii_lowercase]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH).save_pretrained(folder)


def write_stable_diffusion(
    folder: Path, text_width: int = TEXT_WIDTH, unet: dict[str, Any] | None = None, **scheduler: Any
) -> Path:
    toy_unet(text_width, **(unet or {})).save_pretrained(folder / "unet")
    toy_vae().save_pretrained(folder / "vae")
    toy_text_encoder(text_width).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **scheduler}))
    return folder


def write_clip(folder: Path, num_layers: int = 8) -> Path:
    toy_clip_tower(num_layers).save_pretrained(folder)
    return folder


def hash_files(folder: Path) -> str:
    """Return the hash over the files of a network or tokenizer, by which earlier versions recorded it."""
    weights = list(folder.glob("*.safetensors"))
    files = [*weights, folder / "config.json"] if weights else list(folder.iterdir())
    return hash_json({path.name: sha256_file(path) for path in files})
