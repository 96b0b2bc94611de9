"""The folder set of the phantom networks, in Hugging Face layout: written from networks, whether trained or not.

stable-diffusion/{model_index.json, unet, vae, text_encoder, tokenizer, scheduler}
clip-vision/{config.json, model.safetensors, preprocessor_config.json}
clip-projections/model.safetensors, what CLIP has besides its towers
judges/{plain, residual, depthwise, mixer}/{config.json, model.safetensors}
training.json, where they were trained (see ``shards.phantom.networks.history``)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel

from nd_dist.errors import CheckpointError
from nd_dist.evaluation.reconstruction.networks import REMARK
from nd_dist.files import atomic_path, read_json, write_json, write_text
from nd_dist.frozen.phantom_judges import JUDGE_KINDS, JudgeNetwork, load_judges
from shards.phantom.captions import vocabulary
from shards.phantom.networks.architectures import (
    SCHEDULER_CONFIG,
    build_clip,
    build_judge,
    build_unet,
    build_vae,
)
from shards.phantom.networks.batches import pixels_of
from shards.phantom.networks.tokenizer import write_tokenizer
from shards.phantom.pictures import training_scene
from shards.phantom.sprites import DATA_DIR

STABLE_DIFFUSION, CLIP_VISION, JUDGES = "stable-diffusion", "clip-vision", "judges"
PROJECTIONS = "clip-projections/model.safetensors"
PREPROCESSOR = "preprocessor_config.json"  # with ImageNet's statistics, which the guidance also uses
_JOINT = ("visual_projection.weight", "text_projection.weight", "logit_scale")
"""What CLIP has besides its towers: nothing but retrieval between pictures and captions needs it."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Networks:
    """All phantom networks, in float32 on the CPU.

    Args:
        vae, clip, unet: diffusers' AutoencoderKL, transformers' CLIPModel, diffusers' UNet2DConditionModel.
        judges: Kind -> judge.
    """

    vae: Any  # Any: diffusers and transformers ship no usable types
    clip: Any
    unet: Any
    judges: nn.ModuleDict


def build_networks(seed: int, vocab_size: int) -> Networks:
    """Return all networks untrained; the end token is the last of the vocabulary."""
    judges = nn.ModuleDict({kind: build_judge(kind, seed) for kind in JUDGE_KINDS})
    return Networks(build_vae(seed), build_clip(seed, vocab_size, vocab_size - 1), build_unet(seed), judges)


@torch.no_grad()
def set_scaling_factor(vae: Any, seed: int, num_pictures: int) -> float:
    """Set ``vae.config.scaling_factor`` to 1 / standard deviation of the latents of training pictures; return it."""
    scenes = [training_scene(seed, 0, row) for row in range(num_pictures)]
    batches = [scenes[start : start + 64] for start in range(0, num_pictures, 64)]
    latents = torch.cat([vae.encode(2 * pixels_of(batch, CPU) - 1).latent_dist.mean for batch in batches])
    factor = round(1 / float(latents.double().std()), 5)
    vae.register_to_config(scaling_factor=factor)
    return factor


def text_encoder_of(clip: Any) -> Any:
    """Return the text tower of a CLIPModel as a CLIPTextModel of its own."""
    return _tower(CLIPTextModel(clip.config.text_config), clip, "text_model.")


def vision_encoder_of(clip: Any) -> Any:
    """Return the vision tower of a CLIPModel as a CLIPVisionModel of its own."""
    return _tower(CLIPVisionModel(clip.config.vision_config), clip, "vision_model.")


def _tower(tower: Any, clip: Any, prefix: str) -> Any:
    """Load a tower from the CLIPModel's weights; the tower's own names have the prefix in transformers 4 only."""
    weights = {name: value for name, value in clip.state_dict().items() if name.startswith(prefix)}
    if not any(name.startswith(prefix) for name in tower.state_dict()):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    tower.load_state_dict(weights)
    return tower.eval().requires_grad_(False)


def write_folders(out_dir: Path, networks: Networks) -> None:
    """Write the complete folder set in float16 (see the module's docstring)."""
    sd = out_dir / STABLE_DIFFUSION
    (sd / REMARK).unlink(missing_ok=True)
    write_tokenizer(sd / "tokenizer", vocabulary())
    _save(networks.vae, sd / "vae")
    _save(networks.unet, sd / "unet")
    _save(text_encoder_of(networks.clip), sd / "text_encoder")
    version = {"_diffusers_version": diffusers.__version__}
    scheduler = {"_class_name": "DDIMScheduler", **version, **SCHEDULER_CONFIG}
    write_json(sd / "scheduler" / "scheduler_config.json", scheduler)
    write_json(sd / "model_index.json", {**version, **read_json(DATA_DIR / "model_index.json")})
    _save(vision_encoder_of(networks.clip), out_dir / CLIP_VISION)
    write_json(out_dir / CLIP_VISION / PREPROCESSOR, read_json(DATA_DIR / PREPROCESSOR))
    joint = {name: networks.clip.state_dict()[name].half() for name in _JOINT}
    with atomic_path(out_dir / PROJECTIONS) as part:
        save_file(joint, part)
    for kind, judge in networks.judges.items():
        assert isinstance(judge, JudgeNetwork)
        copy.deepcopy(judge).half().save(out_dir / JUDGES / kind)
    for weights in out_dir.rglob("*.safetensors"):
        weights.chmod(0o644)  # written private by some releases; these files are shipped to every user of a machine


def read_folders(folder: Path) -> Networks:
    """Return the networks of a folder set in float32, frozen.

    Raises:
        CheckpointError: one is missing.
    """
    sd = folder / STABLE_DIFFUSION
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        vae = AutoencoderKL.from_pretrained(sd / "vae", **options).float().eval().requires_grad_(False)
        unet = UNet2DConditionModel.from_pretrained(sd / "unet", **options).float().eval().requires_grad_(False)
        text = CLIPTextModel.from_pretrained(sd / "text_encoder", **options).float()
        vision = CLIPVisionModel.from_pretrained(folder / CLIP_VISION, **options).float()
        joint = {name: value.float() for name, value in load_file(folder / PROJECTIONS).items()}
    except OSError as error:
        raise CheckpointError("A phantom network is missing.", where=str(folder), found=str(error)) from error
    clip = build_clip(0, text.config.vocab_size, text.config.eos_token_id)
    state = {**_prefixed(text, "text_model."), **_prefixed(vision, "vision_model."), **joint}
    state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
    clip.load_state_dict(state)
    return Networks(vae, clip.eval().requires_grad_(False), unet, nn.ModuleDict(load_judges(folder / JUDGES)))


def _prefixed(tower: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return a tower's weights under their names in a CLIPModel (see ``_tower``)."""
    return {name if name.startswith(prefix) else prefix + name: value for name, value in tower.state_dict().items()}


def _save(network: Any, folder: Path) -> None:
    """Write one network in float16 safetensors."""
    copy.deepcopy(network).half().save_pretrained(folder, safe_serialization=True)


def write_untrained(out_dir: Path, seed: int) -> None:
    """Write the complete folder set with random weights: everything loads and runs, nothing is any good."""
    vocab_size = len(write_tokenizer(out_dir / STABLE_DIFFUSION / "tokenizer", vocabulary()))
    networks = build_networks(seed, vocab_size)
    set_scaling_factor(networks.vae, seed, num_pictures=32)
    write_folders(out_dir, networks)
    write_text(out_dir / STABLE_DIFFUSION / REMARK, UNTRAINED)


UNTRAINED = (
    "The networks are untrained (random weights): the reconstructions are noise, and the numbers only show that the "
    "whole line runs.\n"
)
