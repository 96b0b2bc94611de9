"""The guidance CLIP: the first blocks of a CLIP vision tower and what their MLPs put out.

The paper's guidance layers Linear-2, -4 .. -12 are the outputs of the second MLP layer (before the residual) of blocks
0..5; later blocks are not even built. Shape suffixes: B batch, L tokens (class token first, then patches in row
order), D width, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import read_json
from nd_dist.frozen.folders import CONFIG_NAME, NETWORK, list_files, model_name, resolve_folder, weight_files
from nd_dist.frozen.weights import hash_network, iterate_tensors
from nd_dist.pixels import Normalization, resize_bilinear
from nd_dist.schema import NUM_GUIDANCE_LAYERS, guidance_name

# A file may name the tower as transformers 4 (vision_model.encoder...) or 5 (encoder...), alone or inside CLIPModel.
_PREFIX = re.compile(r"^(?:clip\.)?(?:vision_model\.)?")
_NEEDED = re.compile(r"^(?:embeddings\.(?!position_ids)|pre_layrnorm\.|encoder\.layers\.(\d+)\.)")
CLIP_KINDS = ("clip", "clip_vision_model")
_ALIAS = re.compile(r"^Linear-(\d+)$")


def layer_name(name: str) -> str:
    """Return our name of a guidance layer: ``g02`` .. ``g12`` stay, the paper's ``Linear-2`` becomes ``g02``.

    Raises:
        ConfigError: the name is neither.
    """
    known = [guidance_name(block) for block in range(NUM_GUIDANCE_LAYERS)]
    alias = _ALIAS.match(name)
    wanted = f"g{int(alias.group(1)):02d}" if alias else name
    if wanted not in known:
        raise ConfigError("A guidance layer is not known.", found=name, expected=f"one of {known}, or Linear-2 ...")
    return wanted


@dataclass(frozen=True)
class ClipVision:
    """The first blocks of a CLIP vision tower, frozen, with taps on the MLP outputs.

    Args:
        tower: transformers' CLIPVisionModel, cut after the last tapped block.
        name: Model name for the records.
        folder: Where it was read from; None for a tower made in memory.
    """

    tower: Any  # Any: transformers ships no usable types
    name: str = "in memory"
    folder: Path | None = None
    _normalizations: dict[str, Normalization] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """Number of tapped blocks."""
        return int(self.tower.config.num_hidden_layers)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Target names of the taps, in order: ``g02``, ``g04``, ..."""
        return tuple(guidance_name(block) for block in range(self.num_layers))

    @property
    def image_size(self) -> int:
        """Side in pixels of the tower's input."""
        return int(self.tower.config.image_size)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Shape (L, D) of one layer's features: class token and patches, width (50, 768 for ViT-B/32)."""
        patches = self.image_size // int(self.tower.config.patch_size)
        return 1 + patches * patches, int(self.tower.config.hidden_size)

    @property
    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Target name -> shape (L, D) of one image's features."""
        return dict.fromkeys(self.layer_names, self.feature_shape)

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        return next(self.tower.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tower's weights."""
        return next(self.tower.parameters()).dtype  # type: ignore[no-any-return]

    def features(
        self, pixels_BCHW: torch.Tensor, antialias: bool = False, normalize: str = "imagenet"
    ) -> list[torch.Tensor]:
        """Return the MLP output of every block, each (B, L, D), token-major; differentiable.

        Args:
            pixels_BCHW: Pixels in [0,1], any size.
            antialias: See ``resize_bilinear``.
            normalize: Pixel statistics, ``imagenet`` (the released code's choice) or ``clip``.
        """
        resized = resize_bilinear(pixels_BCHW.to(self.device), self.image_size, antialias)
        inputs = self._normalizations.setdefault(normalize, Normalization(normalize))(resized).to(self.dtype)
        return self._tapped([layer.mlp.fc2 for layer in _encoder(self.tower).layers], inputs)

    def _tapped(self, modules: Sequence[torch.nn.Module], inputs_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Return what some modules put out in a pass, each as tokens (B, L, D)."""
        taps: dict[int, torch.Tensor] = {}

        def keep(place: int) -> Callable[[Any, Any, Any], None]:
            return lambda _module, _inputs, output: taps.update({place: _tokens(output)})

        handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
        try:
            self.tower(pixel_values=inputs_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        return [taps[place] for place in range(len(modules))]

    def hash(self, recorded: Collection[str] = ()) -> str:
        """Return the sha256 over the folder's weights and configuration (see ``weights.hash_network``)."""
        if self.folder is None:
            raise CheckpointError("A network made in memory has no files to record.", where=self.name)
        return hash_network(self.folder, recorded=recorded)


def _tokens(output: Any) -> torch.Tensor:
    """Return a module's output as tokens (B, L, D): maps (B, C, H, W) by row, of several outputs the first."""
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor


def load(
    model: str | Path,
    num_layers: int = NUM_GUIDANCE_LAYERS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ClipVision:
    """Load the first ``num_layers`` blocks of a CLIP folder (CLIPModel or CLIPVisionModel, names of any version).

    Raises:
        CheckpointError: the folder is missing, torn, has no weights, too few blocks, or other shapes.
    """
    folder = resolve_folder(model)
    list_files(folder, NETWORK)
    return ClipVision(
        build_tower(_vision_config(folder), weight_files(folder), num_layers).to(device=device, dtype=dtype),
        name=model_name(model),
        folder=folder,
    )


def build_tower(config: dict[str, Any], files: list[Path], num_layers: int = NUM_GUIDANCE_LAYERS) -> Any:
    """Return a frozen tower of ``num_layers`` blocks with weights from files.

    Args:
        config: Arguments of transformers' CLIPVisionConfig.
        files: Weight files, whole checkpoints or towers.
        num_layers: Blocks to build.

    Raises:
        CheckpointError: the files lack a weight, or have it in another shape.
    """
    available = int(config.get("num_hidden_layers", 12))
    where = str(files[0].parent)
    if available < num_layers:
        raise CheckpointError(
            "A CLIP tower has too few blocks.", where=where, expected=f">= {num_layers}", found=available
        )
    tower = CLIPVisionModel(CLIPVisionConfig(**{**config, "num_hidden_layers": num_layers}))
    own = {_PREFIX.sub("", name): tensor for name, tensor in tower.state_dict().items()}
    stored = _read_needed(files, num_layers)
    for name, tensor in own.items():
        if not _NEEDED.match(name):
            continue
        found = tuple(stored[name].shape) if name in stored else "missing"
        if found != tuple(tensor.shape):
            raise CheckpointError(
                f"A CLIP folder's weights do not belong to its configuration: {name}.",
                where=where,
                expected=tuple(tensor.shape),
                found=found,
            )
        tensor.copy_(stored[name])
    return tower.requires_grad_(False).eval()


def _encoder(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower).encoder


def _vision_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG_NAME)
    if (kind := str(config.get("model_type", "clip"))) not in CLIP_KINDS:
        raise CheckpointError(
            "The guidance network is no CLIP.",
            where=str(folder),
            expected=f"a folder of model_type {' or '.join(CLIP_KINDS)}",
            found=kind,
            todo="for another vision tower name the modules to take features from: frozen.guidance_layers=[...]",
        )
    nested = config.get("vision_config")
    return dict(nested if nested is not None else config)


def _read_needed(files: list[Path], num_layers: int) -> dict[str, torch.Tensor]:
    """Return the tensors of embeddings, first norm and the first blocks, named as transformers 5 does."""
    stored: dict[str, torch.Tensor] = {}
    for raw_name, read in iterate_tensors(files):
        name = _PREFIX.sub("", raw_name)
        needed = None if "text_model" in raw_name else _NEEDED.match(name)
        if needed and (needed.group(1) is None or int(needed.group(1)) < num_layers):
            stored[name] = read()
    return stored
