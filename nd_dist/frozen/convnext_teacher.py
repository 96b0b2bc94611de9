"""The frozen ConvNeXt teacher of z's contrastive term: pictures -> one projected row per position of its last map.

A model folder: ``config.json`` and the weights of transformers' ``ConvNextModel``, and
``projector.safetensors`` with ``norm.{weight,bias}`` and ``layers.{i}.{weight,bias}``, i counting Linear, LayerNorm,
ReLU, Linear, LayerNorm, ReLU, Linear (a Linear without a bias in the file has none).

Legend of shape suffixes: B pictures, C channels, H W height and width, P positions of the last map, D projected width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nd_dist.checkpoint import read_tensors
from nd_dist.errors import CheckpointError
from nd_dist.frozen.folders import find_weights, resolve_folder

PROJECTOR = "projector.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
"""Pixel statistics as released; the first deviation is not ImageNet's .229."""
_LINEARS, _NORMS = (0, 3, 6), (1, 4)


class ConvNextTeacher(nn.Module):
    """Network and projector, in evaluation mode and without gradients.

    Args:
        folder: A model folder, or the name of one in the local Hugging Face cache.

    Raises:
        CheckpointError: the folder lacks a part, or weights do not fit.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        from transformers import ConvNextModel  # seconds to import, and only a run with a teacher needs it

        path = resolve_folder(folder)
        try:
            self.network = ConvNextModel.from_pretrained(path, **find_weights(path).options)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                "The teacher's ConvNeXt cannot be loaded.", where=str(path), found=str(error).splitlines()[0]
            ) from error
        self.norm, self.layers = _projector(read_tensors(path / PROJECTOR), path)
        config = self.network.config
        self.downscale: int = config.patch_size * 2 ** (len(config.depths) - 1)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width D of a row."""
        return len(next(reversed(list(self.layers.parameters()))))

    @torch.no_grad()
    def forward(self, pictures_BCHW: torch.Tensor) -> torch.Tensor:
        """Return rows (B, P, D) of RGB pictures in [0, 1]; height and width are multiples of ``downscale``."""
        normalised = (pictures_BCHW - self.mean) / self.std
        maps_BCHW: torch.Tensor = self.network(normalised).last_hidden_state
        rows: torch.Tensor = self.layers(self.norm(maps_BCHW.flatten(2).transpose(1, 2)))
        return rows


def _projector(weights: dict[str, torch.Tensor], folder: Path) -> tuple[nn.LayerNorm, nn.Sequential]:
    """Return the norm and the layers that a projector file describes.

    Raises:
        CheckpointError: a weight is missing, or one is there that does not belong.
    """
    if missing := [name for name in ("norm.weight", *(f"layers.{i}.weight" for i in _LINEARS)) if name not in weights]:
        raise CheckpointError(
            "The teacher's projector is incomplete.", where=str(folder / PROJECTOR), expected=missing
        )
    layers = nn.Sequential()
    for i in range(_LINEARS[-1] + 1):
        if i in _LINEARS:
            outputs, inputs = weights[f"layers.{i}.weight"].shape
            layers.append(nn.Linear(inputs, outputs, bias=f"layers.{i}.bias" in weights))
        else:
            layers.append(nn.LayerNorm(outputs) if i in _NORMS else nn.ReLU())
    parts = nn.ModuleDict({"norm": nn.LayerNorm(len(weights["norm.weight"])), "layers": layers})
    try:
        parts.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            "The teacher's projector does not fit.", where=str(folder / PROJECTOR), found=str(error)
        ) from error
    norm = parts["norm"]
    assert isinstance(norm, nn.LayerNorm)
    return norm, layers
