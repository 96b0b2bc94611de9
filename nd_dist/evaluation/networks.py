"""The frozen networks that an evaluation needs, and what identifies them. Loaded once per rank, only if needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nd_dist.config import Config
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler, SampleResult
from nd_dist.frozen import clip_vision, stable_diffusion
from nd_dist.frozen.compatibility import check_compatible
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.folders import hash_weights, require_part, resolve_folder
from nd_dist.frozen.judges import Judge, has_phantom_judges, load_field_judges, load_phantom_judges
from nd_dist.metrics.protocols import protocol_named

PHANTOM_JUDGES = "judges"
REMARK = "remark.txt"  # in a model folder: a sentence that every report of its pictures shows


class Sampler(Protocol):
    """What makes pictures from targets: ``GuidedSampler``."""

    def sample(
        self,
        c_BLD: Tensor,
        z_BCHW: Tensor,
        targets: Mapping[str, Tensor],
        requests: Sequence[NoiseRequest],
        kappa: float | None = None,
        eta: float | None = None,
    ) -> SampleResult:
        """Return one picture per request."""
        ...


class Networks(Protocol):
    """Networks of an evaluation, loaded on first use."""

    def identity(self) -> dict[str, str]:
        """Return what identifies the networks that make the pictures; equal text, equal pictures."""
        ...

    def sampler(self) -> Sampler:
        """Return the guided sampler."""
        ...

    def judges(self) -> Sequence[Judge]:
        """Return the metric networks; none leaves pixel metrics only."""
        ...


@dataclass
class ModelFolders:
    """The networks of a recipe, read from its model folders.

    Args:
        config: The recipe; its ``model`` and ``guidance_model`` name the folders.
        device: Where they run.
        judges_dir: Folder of the field's judges; None takes the phantom's judges, which lie in ``judges`` beside a
            phantom model, or goes without.
        sources: Target store -> what made it, as the shards' index records it; refused where the recipe's networks
            or settings would make other targets.
    """

    config: Config
    device: torch.device
    judges_dir: Path | None = None
    sources: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """Return hashes of UNet, VAE, text encoder, guidance CLIP and scheduler settings."""
        folder = resolve_folder(self.config.model)
        parts = {part: hash_weights(require_part(folder, part)) for part in ("unet", "vae", "text_encoder")}
        scheduler = require_part(folder, "scheduler", stable_diffusion.SCHEDULER_CONFIG)
        settings = (scheduler / stable_diffusion.SCHEDULER_CONFIG).read_text(encoding="utf-8")
        guidance = hash_weights(resolve_folder(self.config.guidance_model))
        identity = {**parts, "scheduler": settings, "guidance": guidance, "device": self.device.type}
        remark = folder / REMARK
        return {**identity, "remark": remark.read_text(encoding="utf-8").strip()} if remark.is_file() else identity

    def sampler(self) -> Sampler:
        """Return the guided sampler of the recipe.

        Raises:
            DataError: the targets were made by other networks or settings.
        """
        config = self.config
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.sampler.dtype]
        sd = stable_diffusion.load(config.model, dtype=dtype, device=self.device)
        num_layers = len(config.sampler.layer_scale)
        clip = clip_vision.load(config.guidance_model, num_layers, dtype=dtype, device=self.device)
        check_compatible(self.sources, FrozenExtractor(sd, clip, config.frozen, config.seed).fingerprint)
        guidance = ClipGuidance(
            clip, config.sampler.layer_scale, antialias=config.frozen.antialias, normalize=config.frozen.normalize
        )
        return GuidedSampler(sd, guidance, config.sampler)

    def judges(self) -> Sequence[Judge]:
        """Return the field's judges from ``judges_dir``, the phantom's beside a phantom model, or none."""
        if self.judges_dir is not None:
            settings = protocol_named(self.config.evaluation.protocol).judges
            return load_field_judges(self.judges_dir, settings, self.device)
        beside = resolve_folder(self.config.model).parent / PHANTOM_JUDGES
        return load_phantom_judges(beside, self.device) if has_phantom_judges(beside) else []
