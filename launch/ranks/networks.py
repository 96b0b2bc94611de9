"""Loads the frozen networks of a recipe onto the device of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nd_dist.config import Config, Dtype
from nd_dist.world import World

if TYPE_CHECKING:
    import torch

    from nd_dist.frozen.extractor import FrozenExtractor


def device_of(world: World) -> torch.device:
    """Return the GPU of a rank (by its rank on the host), or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


def torch_dtype(name: Dtype) -> torch.dtype:
    """Return torch's dtype of a configured name."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_extractor(config: Config, world: World) -> FrozenExtractor:
    """Return what makes targets from pictures and captions.

    Raises:
        CheckpointError: a model folder is missing or incomplete.
    """
    from nd_dist.frozen import clip_vision, stable_diffusion
    from nd_dist.frozen.extractor import FrozenExtractor

    device, dtype = device_of(world), torch_dtype(config.frozen.dtype)
    sd = stable_diffusion.load(config.model, dtype=dtype, device=device)
    clip = clip_vision.load(config.guidance_model, dtype=dtype, device=device)
    return FrozenExtractor(sd, clip, config.frozen, config.seed)
