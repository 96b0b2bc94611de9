"""Pictures between bytes, pixels and the sizes of the metrics, by the field's two backends (tensors, Pillow).

Legend: B pictures, C = 3 channels, H height, W width. Pixels are in [0,1]. Every picture is resized on its own, so a
result never depends on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nd_dist.frozen.resize import pictures_to_pixels

Backend = Literal["tensor", "pil"]
Filter = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Resize:
    """How pictures are brought to a square of ``size`` pixels; ``size`` None leaves them as they are.

    Args:
        size: Side of the result in pixels.
        backend: ``tensor`` works on floats like torchvision's tensor ``Resize``, ``pil`` on bytes like its PIL one.
        antialias: Only for ``tensor``: torchvision's default was off up to 0.16 and is on from 0.17. Pillow always
            antialiases.
        filter: Interpolation.
    """

    size: int | None
    backend: Backend = "tensor"
    antialias: bool = True
    filter: Filter = "bilinear"

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Return float32 pixels (B, C, size, size); pixels that have that size already come back unchanged."""
        if self.size is None or tuple(pixels_BCHW.shape[-2:]) == (self.size, self.size):
            return pixels_BCHW.float()
        if self.backend == "pil":
            return _resize_pil(pixels_BCHW, self.size, self.filter)
        resized_BCHW = F.interpolate(
            pixels_BCHW.float(),
            size=(self.size, self.size),
            mode=self.filter,
            align_corners=False,
            antialias=self.antialias,
        )
        return resized_BCHW.clamp(0, 1) if self.filter == "bicubic" else resized_BCHW


def pixels_to_bytes(pixels_BCHW: Tensor, rounding: Literal["round", "truncate"] = "round") -> npt.NDArray[np.uint8]:
    """Return pictures in [0,1] as bytes (B, H, W, C); values outside are clamped."""
    scaled_BCHW = pixels_BCHW.detach().float().clamp(0, 1) * 255
    whole_BCHW = scaled_BCHW.round() if rounding == "round" else scaled_BCHW.floor()
    return whole_BCHW.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _resize_pil(pixels_BCHW: Tensor, size: int, kind: Filter) -> Tensor:
    """Resize through Pillow: bytes in, bytes out, always antialiased."""
    resample = Image.Resampling.BILINEAR if kind == "bilinear" else Image.Resampling.BICUBIC
    pictures = [Image.fromarray(picture).resize((size, size), resample) for picture in pixels_to_bytes(pixels_BCHW)]
    return pictures_to_pixels(np.stack([np.asarray(picture) for picture in pictures])).to(pixels_BCHW.device)
