"""Resizing and normalising pictures before the frozen networks, without torchvision.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from nd_dist.errors import ConfigError

_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def pictures_to_pixels(pictures_BHWC: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return uint8 pictures (B, H, W, 3) as float32 pixels (B, 3, H, W) in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures_BHWC)).permute(0, 3, 1, 2).contiguous().float() / 255.0


def resize_bilinear(pixels_BCHW: torch.Tensor, size: int, antialias: bool) -> torch.Tensor:
    """Return pixels (B, C, size, size), resized as torchvision's tensor ``Resize`` does; differentiable.

    Args:
        pixels_BCHW: Pixels, any range; half precision is resized in float32.
        size: Side of the square result.
        antialias: torchvision's tensor default: off up to 0.16, on from 0.17.
    """
    if tuple(pixels_BCHW.shape[-2:]) == (size, size):
        return pixels_BCHW
    wide = pixels_BCHW.to(torch.promote_types(pixels_BCHW.dtype, torch.float32))
    resized = F.interpolate(wide, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return resized.to(pixels_BCHW.dtype)


def resize_lanczos(pictures_BHWC: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return uint8 pictures (B, size, size, 3), resized by Pillow's Lanczos filter."""
    if pictures_BHWC.shape[1:3] == (size, size):
        return pictures_BHWC
    images = [Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS) for picture in pictures_BHWC]
    return np.stack([np.asarray(image) for image in images])


def normalize_pixels(pixels_BCHW: torch.Tensor, statistics: str) -> torch.Tensor:
    """Return pixels of [0,1] minus the mean, over the standard deviation of ``imagenet`` or ``clip``.

    Raises:
        ConfigError: unknown statistics.
    """
    if statistics not in _STATISTICS:
        raise ConfigError("Unknown pixel statistics.", found=statistics, expected=f"one of {sorted(_STATISTICS)}")
    mean, std = (
        torch.tensor(values, dtype=pixels_BCHW.dtype, device=pixels_BCHW.device).view(1, 3, 1, 1)
        for values in _STATISTICS[statistics]
    )
    return (pixels_BCHW - mean) / std
