"""The augmented pictures that z's teacher sees, made of given random numbers (the released code uses kornia's).

Legend of shape suffixes: B pictures, C = 3 colours, H W height and width. Pixels are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)
JITTER_P, GREY_P, SOLARIZE_P, BLUR_P = 0.8, 0.2, 0.2, 0.1
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BLUR_SIZE, BLUR_SIGMA = 7, (0.1, 2.0)
CROP_SCALE, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
SOLARIZE_AT, SOLARIZE_ADD = (0.4, 0.6), (-0.1, 0.1)
PURPOSES = ("if_jitter", "brightness", "contrast", "saturation", "hue", "if_grey", "if_solarize", "solarize_add",
            "solarize_at", "if_blur", "sigma", "crop_area", "crop_ratio", "crop_x", "crop_y")  # fmt: skip
"""What the random numbers of a picture are for."""

Numbers = Mapping[str, torch.Tensor]
"""Purpose -> uniform numbers in [0, 1) (B,)."""


def augment(pictures_BCHW: torch.Tensor, draws: Numbers, order: Sequence[int]) -> torch.Tensor:
    """Return augmented pictures of the same shape.

    Colour jitter, grey, solarize, blur, then a resized crop.

    Args:
        pictures_BCHW: RGB.
        draws: One number of every purpose and picture.
        order: In which brightness (0), contrast, saturation and hue (3) are changed.

    Source: NeuralDiffuser's low-level training; probabilities and ranges as released.
    """
    jittered_BCHW = pictures_BCHW
    for i in order:
        jittered_BCHW = _JITTERS[i](jittered_BCHW, draws)
    changed = _where("jitter", JITTER_P, jittered_BCHW, pictures_BCHW, draws)
    changed = _where("grey", GREY_P, _grey(changed).expand_as(changed), changed, draws)
    changed = _where("solarize", SOLARIZE_P, _solarized(changed, draws), changed, draws)
    changed = _where("blur", BLUR_P, _blurred(changed, draws), changed, draws)
    return _cropped(changed, draws)


def _between(draws: Numbers, purpose: str, low: float, high: float) -> torch.Tensor:
    """Return one uniform number per picture, (B, 1, 1, 1)."""
    return low + (high - low) * draws[purpose][:, None, None, None]


def _where(purpose: str, share: float, changed: torch.Tensor, plain: torch.Tensor, draws: Numbers) -> torch.Tensor:
    """Return ``changed`` for a share of the pictures."""
    return torch.where(_between(draws, f"if_{purpose}", 0.0, 1.0) < share, changed, plain)


def _grey(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the luma (B, 1, H, W)."""
    weights = torch.tensor(GREY, device=pictures_BCHW.device)[:, None, None]
    return (pictures_BCHW * weights).sum(dim=1, keepdim=True)


def _brighter(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    return (pictures_BCHW * _between(draws, "brightness", 1 - BRIGHTNESS, 1 + BRIGHTNESS)).clamp(0, 1)


def _contrasted(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    mean = _grey(pictures_BCHW).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, pictures_BCHW, _between(draws, "contrast", 1 - CONTRAST, 1 + CONTRAST)).clamp(0, 1)


def _saturated(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    factor = _between(draws, "saturation", 1 - SATURATION, 1 + SATURATION)
    return torch.lerp(_grey(pictures_BCHW), pictures_BCHW, factor).clamp(0, 1)


def _hue_turned(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    """Turn the hue of HSV: value and saturation stay."""
    high, low = pictures_BCHW.amax(dim=1, keepdim=True), pictures_BCHW.amin(dim=1, keepdim=True)
    span = high - low
    red, green, blue = (pictures_BCHW[:, i : i + 1] for i in range(3))
    safe = torch.where(span > 0, span, 1.0)
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixth + 6 * _between(draws, "hue", -HUE, HUE)
    channels = [_hsv_channel(turned, high, span, offset) for offset in (5.0, 3.0, 1.0)]
    return torch.cat(channels, dim=1)


def _hsv_channel(sixth: torch.Tensor, high: torch.Tensor, span: torch.Tensor, offset: float) -> torch.Tensor:
    """Return red, green or blue (offset 5, 3, 1) of a hue in sixths, a value and a span."""
    place = (offset + sixth) % 6
    return high - span * torch.minimum(place, 4 - place).clamp(0, 1)


_JITTERS: tuple[Callable[[torch.Tensor, Numbers], torch.Tensor], ...] = (
    _brighter,
    _contrasted,
    _saturated,
    _hue_turned,
)


def _solarized(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    """Invert what is brighter than a threshold, after a small shift."""
    shifted = (pictures_BCHW + _between(draws, "solarize_add", *SOLARIZE_ADD)).clamp(0, 1)
    return torch.where(shifted >= _between(draws, "solarize_at", *SOLARIZE_AT), 1 - shifted, shifted)


def _blurred(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    """Blur every picture with its own Gaussian, reflected at the border."""
    num, channels = pictures_BCHW.shape[:2]
    sigma_B1 = _between(draws, "sigma", *BLUR_SIGMA).view(num, 1)
    offset = torch.arange(BLUR_SIZE, device=pictures_BCHW.device) - BLUR_SIZE // 2
    kernel_BK = torch.softmax(-(offset**2) / (2 * sigma_B1**2), dim=1)
    kernels = kernel_BK.repeat_interleave(channels, dim=0)[:, None]
    pad = BLUR_SIZE // 2
    maps = F.pad(pictures_BCHW, (pad, pad, pad, pad), mode="reflect").flatten(0, 1)[None]
    maps = F.conv2d(maps, kernels[..., None], groups=num * channels)
    return F.conv2d(maps, kernels[:, :, None], groups=num * channels).view_as(pictures_BCHW)


def _cropped(pictures_BCHW: torch.Tensor, draws: Numbers) -> torch.Tensor:
    """Cut a box of random area, aspect and place out of every picture and enlarge it to the whole, bilinear."""
    area = _between(draws, "crop_area", *CROP_SCALE).flatten()
    ratio = _between(draws, "crop_ratio", *(math.log(value) for value in CROP_RATIO)).flatten().exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left = _between(draws, "crop_x", 0.0, 1.0).flatten() * (1 - width)
    top = _between(draws, "crop_y", 0.0, 1.0).flatten() * (1 - height)
    zero = torch.zeros_like(width)
    # grid_sample counts from -1 to 1: the box's middle, and its half size
    across = torch.stack([width, zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(pictures_BCHW.shape), align_corners=False)
    return F.grid_sample(pictures_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
