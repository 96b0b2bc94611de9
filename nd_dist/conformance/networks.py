"""The reference cases' tiny networks, rebuilt from ``weights/``: constructor arguments and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from nd_dist.errors import CheckpointError
from nd_dist.files import read_json
from nd_dist.frozen.clip_vision import ClipVision, build_tower
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.schema import NUM_GUIDANCE_LAYERS

LAYER_SCALE = (1.5, 1.2, 1.0, 1.0, 1.0, 1.0)
TARGET_NAMES = tuple(f"Linear-{2 * (block + 1)}" for block in range(NUM_GUIDANCE_LAYERS))
"""The guidance layers, as the cases name them."""


@dataclass(frozen=True)
class ReferenceWeights:
    """The folder ``weights`` beside the cases.

    Args:
        folder: Where it is.

    Raises:
        CheckpointError: (all methods) it or a file in it is missing or damaged.
    """

    folder: Path

    def stable_diffusion(self, dtype: torch.dtype) -> StableDiffusion:
        """Return UNet, VAE and scheduler settings, without a text encoder."""
        configs = self._configs()
        unet = self._network(UNet2DConditionModel, configs["unet"], "unet.safetensors")
        vae = self._network(AutoencoderKL, configs["vae"], "vae.safetensors")
        return StableDiffusion(_frozen(unet, dtype), _frozen(vae, dtype), configs["scheduler"])

    def clip(self, dtype: torch.dtype) -> ClipVision:
        """Return the guidance CLIP."""
        self._require("clip_vision_hf.safetensors")
        tower = build_tower(self._configs()["clip_vision_hf"], [self.folder / "clip_vision_hf.safetensors"])
        return ClipVision(_frozen(tower, dtype))

    def _configs(self) -> Mapping[str, Any]:
        self._require("configs.json")
        configs: Mapping[str, Any] = read_json(self.folder / "configs.json")
        return configs

    def _require(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise CheckpointError(
                "The reference cases need their networks' weights, and a file is missing.",
                where=str(self.folder / name),
                todo="copy the folder weights beside the cases",
            )

    def _network(self, network_class: Any, config: Mapping[str, Any], name: str) -> Any:
        self._require(name)
        network = network_class(**config)
        try:
            network.load_state_dict(load_file(self.folder / name))
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                "A reference network's weights do not load.", where=str(self.folder / name), found=str(error)
            ) from error
        return network


def _frozen(network: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(network.requires_grad_(False).eval(), dtype=dtype)
