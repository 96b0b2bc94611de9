"""Any vision tower of transformers as guidance network: DINOv2, ViT, ConvNeXt, timm's through its wrapper.

Targets g02, g04 .. are what the named modules put out, as tokens. Shape suffixes: B batch, L tokens, D width, C = 3
channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.frozen.clip_vision import ClipVision, load
from nd_dist.frozen.folders import model_name, resolve_folder
from nd_dist.pixels import Normalization, resize_bilinear
from nd_dist.schema import NUM_GUIDANCE_LAYERS


@dataclass(frozen=True)
class VisionTower(ClipVision):
    """A frozen vision tower with taps on modules by name.

    Args:
        layers: Names of the tapped modules, in the order of the targets.
    """

    layers: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of tapped modules."""
        return len(self.layers)

    @property
    def image_size(self) -> int:
        """Side in pixels of the tower's input."""
        size = getattr(self.tower.config, "image_size", None) or self.tower.config.pretrained_cfg["input_size"][-1]
        return int(size if isinstance(size, int) else size[0])

    @cached_property
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Target name -> shape (L, D) of one image's features."""
        with torch.inference_mode():
            taps = self.features(torch.zeros(1, 3, self.image_size, self.image_size))
        return {name: tuple(tap.shape[1:]) for name, tap in zip(self.layer_names, taps, strict=True)}

    def features(
        self, pixels_BCHW: torch.Tensor, antialias: bool = False, normalize: str = "imagenet"
    ) -> list[torch.Tensor]:
        """Return what every tapped module puts out as tokens (B, L, D); see ``ClipVision.features``."""
        resized = resize_bilinear(pixels_BCHW.to(self.device), self.image_size, antialias)
        inputs = self._normalizations.setdefault(normalize, Normalization(normalize))(resized).to(self.dtype)
        modules = [self.tower.get_submodule(layer) for layer in self.layers]
        return self._tapped(modules, inputs)


def load_guidance_network(config: Config, dtype: torch.dtype, device: torch.device | str) -> ClipVision:
    """Return the guidance network of a recipe: a CLIP's first blocks, or another tower with the layers that it names.

    Raises:
        CheckpointError, ConfigError: see ``clip_vision.load`` and ``load_tower``.
    """
    if config.frozen.guidance_layers:
        return load_tower(config.guidance_model, config.frozen.guidance_layers, dtype, device)
    return load(config.guidance_model, len(config.sampler.layer_scale), dtype, device)


def load_tower(
    model: str | Path, layers: Sequence[str], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> VisionTower:
    """Load a tower that transformers knows, with taps on some of its modules.

    Args:
        model: Folder in Hugging Face layout.
        layers: Names of the modules.
        dtype: Of the weights.
        device: Where it runs.

    Raises:
        CheckpointError: transformers cannot read the folder.
        ConfigError: there is no such module, or there are more than there are targets.
    """
    from transformers import AutoModel

    folder = resolve_folder(model)
    try:
        whole: Any = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "The guidance network cannot be read.",
            where=str(folder),
            expected="a vision tower that transformers' AutoModel reads",
            found=str(error).splitlines()[0],
        ) from error
    tower = getattr(whole, "vision_model", whole).requires_grad_(False).eval()
    known = dict(tower.named_modules())
    unknown = [layer for layer in layers if layer not in known]
    if unknown or len(layers) > NUM_GUIDANCE_LAYERS:
        raise ConfigError(
            "frozen.guidance_layers names no modules of the guidance network.",
            where=str(folder),
            expected=f"at most {NUM_GUIDANCE_LAYERS} of {', '.join(name for name in known if name)}"[:600],
            found=", ".join(unknown or layers),
        )
    return VisionTower(tower.to(device=device, dtype=dtype), model_name(model), folder, tuple(layers))
