"""nd_dist: the library of distributed NeuralDiffuser (models, guided diffusion, metrics, training, evaluation).

What most programs need can be imported from here; torch and diffusers come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nd_dist.versions import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from nd_dist.config import Config
    from nd_dist.diffusion.clip_guidance import ClipGuidance
    from nd_dist.diffusion.guidance import LatentGuidance, PixelGuidance
    from nd_dist.diffusion.sampler import GuidedSampler
    from nd_dist.diffusion.samples import SampleOptions
    from nd_dist.frozen.clip_vision import ClipVision
    from nd_dist.frozen.clip_vision import load as load_clip_vision
    from nd_dist.frozen.stable_diffusion import StableDiffusion
    from nd_dist.frozen.stable_diffusion import load as load_stable_diffusion
    from nd_dist.metrics.protocols import PROTOCOLS
    from nd_dist.models.decoder import Decoder
    from nd_dist.pipeline import NeuralDiffuserPipeline
    from nd_dist.report.evaluation_card import evaluation_card

_FACE = {
    "Config": "config",
    "ClipGuidance": "diffusion.clip_guidance",
    "LatentGuidance": "diffusion.guidance",
    "PixelGuidance": "diffusion.guidance",
    "GuidedSampler": "diffusion.sampler",
    "SampleOptions": "diffusion.samples",
    "ClipVision": "frozen.clip_vision",
    "load_clip_vision": "frozen.clip_vision:load",
    "StableDiffusion": "frozen.stable_diffusion",
    "load_stable_diffusion": "frozen.stable_diffusion:load",
    "PROTOCOLS": "metrics.protocols",
    "Decoder": "models.decoder",
    "NeuralDiffuserPipeline": "pipeline",
    "evaluation_card": "report.evaluation_card",
}
__all__ = [
    "PROTOCOLS",
    "ClipGuidance",
    "ClipVision",
    "Config",
    "Decoder",
    "GuidedSampler",
    "LatentGuidance",
    "NeuralDiffuserPipeline",
    "PixelGuidance",
    "SampleOptions",
    "StableDiffusion",
    "evaluation_card",
    "load_clip_vision",
    "load_stable_diffusion",
]


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _FACE[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
