"""The field's metric networks: AlexNet, Inception-v3, CLIP ViT-L/14, EfficientNet-B1 and SwAV's ResNet-50.

torchvision is optional (extra ``judges``) and imported only here. Weights are read from a local folder of safetensors;
nothing is downloaded and no pickle is opened. Legend: B pictures, C = 3 channels, H height, W width, D features.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import sha256_file
from nd_dist.frozen.folders import NETWORK, find_weights, list_files, weight_files
from nd_dist.frozen.judges import Judge, NetworkJudge, Preparation, Score, SharedPass, Statistics, tap_layers
from nd_dist.frozen.optional_judges import load_distribution_judge
from nd_dist.metrics.protocols import JudgeSettings
from nd_dist.pixels import Resize


@dataclass(frozen=True)
class _Recipe:
    """One field judge: file, torchvision builder, tap."""

    name: str
    score: Score
    file: str
    builder: str
    tap: str
    input_size: str
    weights: str


_RECIPES = (
    _Recipe("alexnet_2", "two_way", "alexnet", "alexnet", "features.4", "alexnet", "AlexNet IMAGENET1K_V1"),
    _Recipe("alexnet_5", "two_way", "alexnet", "alexnet", "features.11", "alexnet", "AlexNet IMAGENET1K_V1"),
    _Recipe("inception", "two_way", "inception_v3", "inception_v3", "avgpool", "inception", "IMAGENET1K_V1"),
    _Recipe("effnet_b", "distance", "efficientnet_b1", "efficientnet_b1", "avgpool", "efficientnet", "IMAGENET1K"),
    _Recipe("swav", "distance", "swav_resnet50", "resnet50", "avgpool", "swav", "facebookresearch/swav resnet50"),
)
CLIP_FOLDER = "clip-vit-large-patch14"


def load_field_judges(folder: Path, settings: JudgeSettings, device: torch.device) -> list[Judge]:
    """Load AlexNet(2), AlexNet(5), Inception-v3, CLIP ViT-L/14, EfficientNet-B1 and SwAV from a local folder.

    Args:
        folder: Holds ``alexnet.safetensors``, ``inception_v3.safetensors``, ``efficientnet_b1_v1.safetensors`` or
            ``_v2``, ``swav_resnet50.safetensors`` (state dictionaries) and the folder ``clip-vit-large-patch14``.
        settings: Input sizes and weights of the protocol.
        device: Where they run.

    Raises:
        ConfigError: torchvision is not installed, or cannot be imported beside this torch.
        CheckpointError: a weight file is missing or does not fit its network.
    """
    models = _torchvision_models()
    inputs = _Inputs(settings, device)
    judges: list[Judge] = []
    for _, recipes in itertools.groupby(_RECIPES, key=lambda recipe: recipe.file):
        judges += _torchvision_judges(models, list(recipes), folder, inputs)
    judges.insert(3, _clip_judge(folder / CLIP_FOLDER, inputs))
    return [*judges, *load_distribution_judge(folder, device)]


def require_field_judges(folder: Path, settings: JudgeSettings) -> None:
    """Refuse a folder that lacks a network of ``load_field_judges``; nothing is read.

    Raises:
        ConfigError: torchvision is not installed, or cannot be imported beside this torch.
        CheckpointError: a weight file is missing.
    """
    _torchvision_models()
    for recipe in _RECIPES:
        _require_file(_weights_path(folder, recipe, settings), recipe)
    list_files(folder / CLIP_FOLDER, NETWORK)


class _Inputs:
    """What the networks get; those of one size and normalisation share it.

    Args:
        settings: Input sizes and weights of the protocol.
        device: Where the networks run.
    """

    def __init__(self, settings: JudgeSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self._made: dict[tuple[int, Statistics], Preparation] = {}

    def of(self, name: str, statistics: Statistics) -> Preparation:
        """Return the preparation of a network's input by its name in the settings."""
        size = getattr(self.settings, name)
        resize = Resize(size, self.settings.backend, self.settings.antialias)
        return self._made.setdefault((size, statistics), Preparation(resize, statistics, self.device))


def _torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "The field's metric networks need torchvision, which cannot be imported here.",
            found=str(error),
            todo='install the extra that fits your torch: pip install "nd-dist[judges]"',
        ) from error


def _torchvision_judges(
    models: ModuleType, recipes: Sequence[_Recipe], folder: Path, inputs: _Inputs
) -> list[NetworkJudge]:
    """Return the judges of one network: torchvision's architecture, our weights file, a tapped layer each."""
    recipe = recipes[0]
    path = _weights_path(folder, recipe, inputs.settings)
    # torchvision's pretrained Inception-v3 re-scales its normalised input; without weights it has to be told to
    inception: dict[str, Any] = {"init_weights": False, "transform_input": True}
    options = inception if recipe.builder == "inception_v3" else {}
    network = getattr(models, recipe.builder)(weights=None, **options)
    _load_weights(network, path, recipe)
    prepare = inputs.of(recipe.input_size, "imagenet")
    # a tenth to a third faster on CPUs; the convolutions follow their weights, whatever the pictures' layout
    network = network.to(inputs.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    shared = SharedPass(tap_layers(network, [recipe.tap for recipe in recipes]))
    digest = f"{path.name}:{sha256_file(path)[:16]}"
    return [
        NetworkJudge(
            recipe.name,
            recipe.score,
            f"{digest}:{recipe.tap}:{prepare.resize}",
            shared.tap(recipe.tap),
            prepare,
        )
        for recipe in recipes
    ]


def _weights_path(folder: Path, recipe: _Recipe, settings: JudgeSettings) -> Path:
    version = f"_{settings.efficientnet_weights.lower()}" if recipe.file == "efficientnet_b1" else ""
    return folder / f"{recipe.file}{version}.safetensors"


def _require_file(path: Path, recipe: _Recipe) -> None:
    if not path.is_file():
        raise CheckpointError(
            "The weights of a metric network are missing.",
            where=str(path),
            expected=f"safetensors of {recipe.weights}",
            todo=f"run `nd fetch judges --to {path.parent}` on a machine with internet access",
        )


def _load_weights(network: Any, path: Path, recipe: _Recipe) -> None:
    """Read a state dictionary; a head that the tapped layer does not need may be missing (SwAV has none)."""
    where = str(path)
    _require_file(path, recipe)
    try:
        missing, unexpected = network.load_state_dict(load_file(path), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            "The weights of a metric network do not fit it.", where=where, found=str(error)[:300]
        ) from error
    needless = ("fc.", "classifier.", "AuxLogits.", "projection_head.", "prototypes.")
    wrong = [name for name in (*missing, *unexpected) if not name.startswith(needless)]
    if wrong:
        raise CheckpointError(
            "The weights of a metric network do not fit it.", where=where, found=", ".join(wrong[:5])
        )


def _clip_judge(folder: Path, inputs: _Inputs) -> NetworkJudge:
    """Return the projected image embedding (768) of OpenAI's CLIP ViT-L/14, from a Hugging Face folder."""
    list_files(folder, NETWORK)
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection.from_pretrained(folder, **find_weights(folder).options)
    network = network.to(inputs.device).requires_grad_(False).eval()
    prepare = inputs.of("clip", "clip")

    def embed(inputs_BCHW: Tensor) -> Tensor:
        embeds_BD: Tensor = network(pixel_values=inputs_BCHW).image_embeds
        return embeds_BD

    digests = "+".join(sha256_file(path)[:16] for path in weight_files(folder))
    identity = f"{CLIP_FOLDER}:{digests}:{prepare.resize}"
    return NetworkJudge("clip", "two_way", identity, embed, prepare)
