"""Loads the frozen networks that make a recipe's targets onto the device of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nd_dist.config import Config
from nd_dist.schema import role_of

if TYPE_CHECKING:
    import torch

    from nd_dist.frozen.extractor import FrozenExtractor


def load_extractor(config: Config, device: torch.device) -> FrozenExtractor:
    """Return what makes the recipe's targets from pictures and captions, with the networks that these need.

    Raises:
        CheckpointError: a model folder is missing or incomplete.
    """
    from nd_dist.device import DTYPES
    from nd_dist.frozen import clip_vision, stable_diffusion
    from nd_dist.frozen.extractor import FrozenExtractor

    dtype, roles = DTYPES[config.frozen.dtype], {role_of(name) for name in config.data.targets}
    parts = [part for role, part in (("semantic", "text_encoder"), ("initial", "vae")) if role in roles]
    sd = stable_diffusion.load(config.model, dtype, device, parts)
    clip = clip_vision.load(config.guidance_model, dtype=dtype, device=device)
    return FrozenExtractor(sd, clip, config.frozen, config.seed)
