"""Pictures leave the sampler: bytes, PNG files, strips and animations of intermediate steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from nd_dist.files import atomic_path
from nd_dist.pixels import to_uint8


def grey_rows(images: torch.Tensor, rows: Sequence[int], dim: int = 0) -> torch.Tensor:
    """Return pictures with some rows (samples along ``dim``) made mid-grey: what a failed sample is shown as."""
    return images.index_fill(dim, torch.tensor(list(rows), dtype=torch.long), 0.5)


def write_steps(folder: Path, pictures_TBCHW: torch.Tensor, kind: Literal["strip", "gif"]) -> None:
    """Write the pictures after every step into a folder: ``steps.png``, or ``steps-0.gif`` and so on.

    Args:
        folder: Where to.
        pictures_TBCHW: Pictures of [0,1], one per step and sample.
        kind: One strip of all samples, or an animation of each.
    """
    if kind == "strip":
        write_strip(folder / "steps.png", pictures_TBCHW)
        return
    for row in range(pictures_TBCHW.shape[1]):
        write_animation(folder / f"steps-{row}.gif", pictures_TBCHW[:, row])


def write_strip(path: Path, pictures_TBCHW: torch.Tensor, every: int = 1) -> None:
    """Write a PNG with one row per sample and its pictures after every ``every`` steps from left to right."""
    frames = [to_uint8(pictures) for pictures in pictures_TBCHW[::every]]
    sheet = np.concatenate([np.concatenate(list(frame), axis=0) for frame in frames], axis=1)
    with atomic_path(path) as part:
        Image.fromarray(sheet).save(part, format="PNG")


def write_animation(path: Path, pictures_TCHW: torch.Tensor, frame_ms: int = 80) -> None:
    """Write a looping GIF of one sample's pictures."""
    frames = [Image.fromarray(picture) for picture in to_uint8(pictures_TCHW)]
    with atomic_path(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], duration=frame_ms, loop=0)
