"""Pictures between bytes, pixels and the sizes that networks and metrics take, without torchvision.

Every picture is resized on its own, so a result never depends on what else is in the batch. Legend: B pictures, C = 3
channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from nd_dist.errors import ConfigError

Backend = Literal["tensor", "pil"]
Filter = Literal["bilinear", "bicubic"]
LANCZOS_ONE = float(1 << 22)

_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def pictures_to_pixels(
    pictures_BHWC: npt.NDArray[np.uint8] | torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """Return uint8 pictures (B, H, W, 3) as float32 pixels (B, 3, H, W) in [0,1].

    Args:
        pictures_BHWC: Pictures.
        memory_format: ``torch.channels_last`` leaves the numbers in the order of the pictures.
    """
    if isinstance(pictures_BHWC, np.ndarray):
        pictures_BHWC = torch.from_numpy(np.ascontiguousarray(pictures_BHWC))
    return pictures_BHWC.permute(0, 3, 1, 2).contiguous(memory_format=memory_format).float() / 255.0


def to_uint8(pixels_BCHW: torch.Tensor, rounding: Literal["round", "truncate"] = "round") -> npt.NDArray[np.uint8]:
    """Return pixels (B, 3, H, W) of [0,1] as bytes (B, H, W, 3); values outside are clamped.

    Args:
        pixels_BCHW: Pixels.
        rounding: ``truncate`` is the released conversion.

    Raises:
        ValueError: a picture holds NaN or infinity (it would turn black in silence).
    """
    if not bool(torch.isfinite(pixels_BCHW).all()):
        raise ValueError("a picture holds NaN or infinity")
    scaled_BHWC = pixels_BCHW.detach().float().clamp(0, 1).permute(0, 2, 3, 1) * 255
    whole_BHWC = scaled_BHWC.round() if rounding == "round" else scaled_BHWC.floor()
    return np.ascontiguousarray(whole_BHWC.to(torch.uint8).cpu().numpy())


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
    if wide.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _resize_by_products(wide.double(), size, antialias).to(pixels_BCHW.dtype)
    return _interpolate(wide, size, "bilinear", antialias).to(pixels_BCHW.dtype)


def _resize_by_products(pixels_BCHW: torch.Tensor, size: int, antialias: bool) -> torch.Tensor:
    """Resize bilinearly by two matrix products: unlike the gradient of CUDA's kernel, theirs adds in a fixed order."""
    rows_SH, columns_SW = (
        F.interpolate(unit[None, None], (size, len(unit)), mode="bilinear", antialias=antialias)[0, 0]
        for unit in (torch.eye(n, dtype=pixels_BCHW.dtype, device=pixels_BCHW.device) for n in pixels_BCHW.shape[-2:])
    )
    return rows_SH @ pixels_BCHW @ columns_SW.T


def resize_lanczos(pictures_BHWC: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return uint8 pictures (B, size, size, 3), resized by Pillow's Lanczos filter."""
    if pictures_BHWC.shape[1:3] == (size, size):
        return pictures_BHWC
    images = [Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS) for picture in pictures_BHWC]
    return np.stack([np.asarray(image) for image in images])


class Lanczos:
    """Does what ``resize_lanczos`` does, byte for byte, on the device where pictures lie.

    Pillow multiplies bytes with weights in whole 2^-22ths; a float64 matrix product of whole numbers is as exact.

    Args:
        size: Side of the result.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._weights: dict[int, torch.Tensor] = {}

    def __call__(self, pictures_BHWC: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, size, size, 3)."""
        pixels_BCHW = pictures_BHWC.permute(0, 3, 1, 2).double()
        for _ in range(2):  # along rows, then along columns
            if (side := pixels_BCHW.shape[-1]) != self._size:
                if side not in self._weights:
                    self._weights[side] = torch.from_numpy(_lanczos_weights(side, self._size)).to(pixels_BCHW.device)
                sums = pixels_BCHW @ self._weights[side].T
                pixels_BCHW = ((sums + LANCZOS_ONE / 2) / LANCZOS_ONE).floor().clamp(0, 255)
            pixels_BCHW = pixels_BCHW.transpose(-1, -2)
        return pixels_BCHW.permute(0, 2, 3, 1).to(torch.uint8)


def _lanczos_weights(side: int, size: int) -> npt.NDArray[np.float64]:
    """Return Pillow's weights (size, side) of each input pixel for each output pixel, in whole 2^-22ths."""
    scale = side / size
    stretch, centers_S1 = max(scale, 1.0), (np.arange(size)[:, None] + 0.5) * scale
    first_S1 = np.maximum(np.trunc(centers_S1 - 3 * stretch + 0.5), 0)
    last_S1 = np.minimum(np.trunc(centers_S1 + 3 * stretch + 0.5), side)
    inputs_W = np.arange(side)
    offsets_SW = (inputs_W - centers_S1 + 0.5) / stretch
    weights_SW = np.sinc(offsets_SW) * np.sinc(offsets_SW / 3) * (np.abs(offsets_SW) < 3)
    weights_SW *= (inputs_W >= first_S1) & (inputs_W < last_S1)
    weights_SW *= LANCZOS_ONE / weights_SW.sum(axis=1, keepdims=True)
    return np.asarray(np.trunc(weights_SW + np.copysign(0.5, weights_SW)), dtype=np.float64)


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

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Return float32 pixels (B, C, size, size); pixels that have that size already come back unchanged."""
        if self.size is None or tuple(pixels_BCHW.shape[-2:]) == (self.size, self.size):
            return pixels_BCHW.float()
        if self.backend == "pil":
            return _resize_pil(pixels_BCHW, self.size, self.filter)
        resized_BCHW = _interpolate(pixels_BCHW.float(), self.size, self.filter, self.antialias)
        return resized_BCHW.clamp(0, 1) if self.filter == "bicubic" else resized_BCHW


class Normalization:
    """Pixels of [0,1] minus the mean, over the standard deviation of ``imagenet`` or ``clip``.

    Keeps the constants on the device: made anew for every call they would make the host wait for the GPU.

    Args:
        statistics: ``imagenet`` or ``clip``.

    Raises:
        ConfigError: unknown statistics.
    """

    def __init__(self, statistics: str) -> None:
        if statistics not in _STATISTICS:
            raise ConfigError("Unknown pixel statistics.", found=statistics, expected=f"one of {sorted(_STATISTICS)}")
        self._statistics = _STATISTICS[statistics]
        self._constants: tuple[torch.Tensor, ...] = ()

    def __call__(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Return normalised pixels (B, 3, H, W)."""
        dtype, device = pixels_BCHW.dtype, pixels_BCHW.device
        if not self._constants or (self._constants[0].dtype, self._constants[0].device) != (dtype, device):
            with torch.inference_mode(False):  # a gradient may need what a pass without one has made
                self._constants = tuple(
                    torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1) for values in self._statistics
                )
        mean, std = self._constants
        return (pixels_BCHW - mean) / std


def normalize_pixels(pixels_BCHW: torch.Tensor, statistics: str) -> torch.Tensor:
    """Return pixels of [0,1] normalised once; see ``Normalization``."""
    return Normalization(statistics)(pixels_BCHW)


def _interpolate(pixels_BCHW: torch.Tensor, size: int, kind: Filter, antialias: bool) -> torch.Tensor:
    """Resize tensors as torchvision's tensor ``Resize`` does."""
    return F.interpolate(pixels_BCHW, size=(size, size), mode=kind, align_corners=False, antialias=antialias)


def _resize_pil(pixels_BCHW: torch.Tensor, size: int, kind: Filter) -> torch.Tensor:
    """Resize through Pillow: bytes in, bytes out, always antialiased."""
    resample = Image.Resampling.BILINEAR if kind == "bilinear" else Image.Resampling.BICUBIC
    pictures = [Image.fromarray(picture).resize((size, size), resample) for picture in to_uint8(pixels_BCHW)]
    return pictures_to_pixels(np.stack([np.asarray(picture) for picture in pictures])).to(pixels_BCHW.device)
