"""The metric networks ("judges"): what a judge is, and the field's six through torchvision and transformers.

torchvision is optional (extra ``judges``) and imported only when a field judge is built. Weights are read from a local
folder of safetensors; nothing is downloaded and no pickle is opened. Which metric a judge's features feed is said by
its ``score``. Legend: B pictures, C = 3 channels, H height, W width, D feature values.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import sha256_file
from nd_dist.frozen.pictures import Backend, Resize
from nd_dist.frozen.resize import normalize_pixels

Score = Literal["two_way", "distance"]
Statistics = Literal["imagenet", "clip", "none"]


@runtime_checkable
class Judge(Protocol):
    """A frozen network whose features compare a reconstruction with a picture."""

    @property
    def name(self) -> str:
        """Name of the metric that its features feed, e.g. ``alexnet_2``."""
        ...

    @property
    def score(self) -> Score:
        """Two-way identification (higher is better) or correlation distance (lower is better)."""
        ...

    @property
    def identity(self) -> str:
        """Text that changes whenever its features would: weights' hash and input settings."""
        ...

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return flattened features (B, D) float32 of pixels in [0,1] of any size."""
        ...


@dataclass(frozen=True)
class JudgeSettings:
    """Input of the field's judges, which repositories set differently (part of a protocol).

    Args:
        alexnet, inception, efficientnet, clip, swav: Side in pixels of each network's input.
        backend: Resize on tensors or through Pillow.
        antialias: Antialiasing of the tensor resize.
        efficientnet_weights: ImageNet weights V1 or V2 of EfficientNet-B1: two different "EffNet-B".
    """

    alexnet: int
    inception: int
    efficientnet: int
    clip: int
    swav: int
    backend: Backend
    antialias: bool
    efficientnet_weights: Literal["V1", "V2"]


@dataclass(frozen=True)
class NetworkJudge:
    """A judge made of a torch network: resize, normalise, run, flatten.

    Args:
        name: Metric name.
        score: Which comparison its features are for.
        identity: Weights' hash and settings, see ``Judge``.
        network: Maps normalised pixels to features of any shape (B, ...).
        resize: To the network's input size.
        statistics: Pixel mean and standard deviation; ``none`` for networks that take [0,1].
        device: Where it runs.
    """

    name: str
    score: Score
    identity: str
    network: Callable[[Tensor], Tensor]
    resize: Resize
    statistics: Statistics
    device: torch.device

    @torch.inference_mode()
    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, D) float32 on the CPU."""
        inputs_BCHW = self.resize(pixels_BCHW.to(self.device))
        if self.statistics != "none":
            inputs_BCHW = normalize_pixels(inputs_BCHW, self.statistics)
        return self.network(inputs_BCHW).flatten(1).float().cpu()


# phantom judge, depth -> what it stands in for: the field's table has four identification columns and a distance
_PHANTOM: tuple[tuple[str, str, Literal["early", "late"], Score], ...] = (
    ("plain_early", "plain", "early", "two_way"),
    ("plain_late", "plain", "late", "two_way"),
    ("residual", "residual", "late", "two_way"),
    ("mixer", "mixer", "late", "two_way"),
    ("depthwise", "depthwise", "late", "distance"),
)
PHANTOM_SIZE = 64


def has_phantom_judges(folder: Path) -> bool:
    """Return whether a folder holds the phantom world's judges."""
    return all((folder / kind / "config.json").is_file() for _, kind, _, _ in _PHANTOM)


def load_phantom_judges(folder: Path, device: torch.device) -> list[Judge]:
    """Load the phantom world's judges: small classifiers, trained apart from the guidance CLIP.

    Args:
        folder: One sub-folder per kind of judge.
        device: Where they run.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    from nd_dist.frozen.phantom_judges import WEIGHTS, load_judges

    networks = load_judges(folder)
    resize = Resize(PHANTOM_SIZE)
    judges: list[Judge] = []
    for name, kind, depth, score in _PHANTOM:
        identity = f"{kind}:{sha256_file(folder / kind / WEIGHTS)[:16]}:{depth}:{resize}"
        network = networks[kind].to(device)
        judges.append(NetworkJudge(name, score, identity, _depth_of(network, depth), resize, "none", device))
    return judges


def _depth_of(network: Any, depth: str) -> Callable[[Tensor], Tensor]:
    """Return a function that gives a phantom judge's early or late features."""

    def run(inputs_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = getattr(network.features(inputs_BCHW), depth)
        return features_BD

    return run


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
    judges: list[Judge] = [_torchvision_judge(models, recipe, folder, settings, device) for recipe in _RECIPES]
    judges.insert(3, _clip_judge(folder / CLIP_FOLDER, settings, device))
    return judges


def _torchvision_models() -> ModuleType:
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            "The field's metric networks need torchvision, which cannot be imported here.",
            found=str(error),
            todo='install the extra that fits your torch: pip install "nd-dist[judges]"',
        ) from error


def _torchvision_judge(
    models: ModuleType, recipe: _Recipe, folder: Path, settings: JudgeSettings, device: torch.device
) -> NetworkJudge:
    """Return one judge: torchvision's architecture, our weights file, one tapped layer."""
    is_efficientnet = recipe.file == "efficientnet_b1"
    path = folder / (f"{recipe.file}_{settings.efficientnet_weights.lower()}" if is_efficientnet else recipe.file)
    path = path.with_name(f"{path.name}.safetensors")
    # torchvision's pretrained Inception-v3 re-scales its normalised input; without weights it has to be told to
    inception: dict[str, Any] = {"init_weights": False, "transform_input": True}
    options = inception if recipe.builder == "inception_v3" else {}
    network = getattr(models, recipe.builder)(weights=None, **options)
    _load_weights(network, path, recipe)
    resize = Resize(getattr(settings, recipe.input_size), settings.backend, settings.antialias)
    return NetworkJudge(
        recipe.name,
        recipe.score,
        f"{path.name}:{sha256_file(path)[:16]}:{recipe.tap}:{resize}",
        tap_layer(network.to(device).requires_grad_(False).eval(), recipe.tap),
        resize,
        "imagenet",
        device,
    )


def _load_weights(network: Any, path: Path, recipe: _Recipe) -> None:
    """Read a state dictionary; a head that the tapped layer does not need may be missing (SwAV has none)."""
    where = str(path)
    if not path.is_file():
        raise CheckpointError(
            "The weights of a metric network are missing.",
            where=where,
            expected=f"safetensors of {recipe.weights}",
            todo=f'on a machine with internet: python -c "import torchvision.models as m, safetensors.torch as s; '
            f"s.save_file(m.{recipe.builder}(weights='DEFAULT').state_dict(), '{path.name}')\" (choose the weights "
            "named above), then copy the file here",
        )
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


def tap_layer(network: Any, layer: str) -> Callable[[Tensor], Tensor]:
    """Return a function that runs ``network`` and gives what its sub-module ``layer`` puts out."""
    module = network.get_submodule(layer)

    def run(inputs_BCHW: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        # cloned, because a layer behind the tap may work in place
        handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.clone()))
        try:
            network(inputs_BCHW)
        finally:
            handle.remove()
        return outputs[0]

    return run


def _clip_judge(folder: Path, settings: JudgeSettings, device: torch.device) -> NetworkJudge:
    """Return the projected image embedding (768) of OpenAI's CLIP ViT-L/14, from a Hugging Face folder."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(
            "The CLIP judge is missing.",
            where=str(folder),
            expected="config.json and model.safetensors of openai/clip-vit-large-patch14",
            todo=f"hf download openai/clip-vit-large-patch14 config.json model.safetensors --local-dir {CLIP_FOLDER}",
        )
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    network = network.to(device).requires_grad_(False).eval()
    resize = Resize(settings.clip, settings.backend, settings.antialias)

    def embed(inputs_BCHW: Tensor) -> Tensor:
        embeds_BD: Tensor = network(pixel_values=inputs_BCHW).image_embeds
        return embeds_BD

    identity = f"{CLIP_FOLDER}:{sha256_file(path)[:16]}:{resize}"
    return NetworkJudge("clip", "two_way", identity, embed, resize, "clip", device)
