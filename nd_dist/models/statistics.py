"""Statistics of z that are stored with a model: what the evaluation re-standardises predicted latents with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nd_dist.checkpoint import read_tensors, write_tensors

FILE = "z_statistics.safetensors"
NAMES = ("prediction_mean", "prediction_std", "target_mean", "target_std")
"""Per element (C, H, W) float32, over the unique training images of the model's subject; population deviations."""


def write_z_statistics(model_dir: Path, statistics: Mapping[str, torch.Tensor]) -> None:
    """Write the statistics (``NAMES``) beside a model, atomically."""
    write_tensors(model_dir / FILE, {name: statistics[name] for name in NAMES})


def read_z_statistics(model_dir: Path) -> dict[str, torch.Tensor]:
    """Return the statistics (``NAMES``) beside a model.

    Raises:
        CheckpointError: the model was saved without them.
    """
    return read_tensors(model_dir / FILE)
