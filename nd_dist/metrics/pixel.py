"""Pixel metrics of pairs of pictures: PixCorr and both kinds of SSIM, one float64 value per pair.

Legend: B pairs, C = 3 channels, H height, W width. Pixels are in [0,1]. Reductions run in float64 and pair by pair, so
a value never depends on what else is in the batch. Does not resize: see ``nd_dist.pixels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

SsimKind = Literal["2d", "columns"]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # int(3.5 * sigma + 0.5): scikit-image's truncation, an 11-tap window
GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # scikit-image's rgb2gray
SAME_COLOUR = 1e-6  # pixels that differ by less were equal bytes, before they were resized


class Picture:
    """A picture that is compared with others: what a metric needs of it alone is computed once, not once a pair.

    Args:
        pixels_CHW: Pixels in [0,1].
        kind: Kind of SSIM.
    """

    def __init__(self, pixels_CHW: Tensor, kind: SsimKind = "2d") -> None:
        self.pixels_CHW, self._kind = pixels_CHW, kind

    def correlation(self, other: Picture) -> float:
        """Return PixCorr with a picture of the same size, see ``pixel_correlation``."""
        return float(self._unit @ other._unit)

    def similarity(self, other: Picture) -> float:
        """Return SSIM with a picture of the same size, see ``structural_similarity``."""
        return float(_ssim(self._moments, other._moments, self._kind))

    @cached_property
    def _unit(self) -> Tensor:
        """The flat pixels (P,) float64 with mean 0 and norm 1; of a picture of one colour zeros."""
        lowest, highest = self.pixels_CHW.aminmax()
        flat_P = self.pixels_CHW.flatten().double()
        flat_P -= flat_P.mean()
        return flat_P.zero_() if bool(highest - lowest <= SAME_COLOUR) else flat_P.div_(flat_P.dot(flat_P).sqrt())

    @cached_property
    def _moments(self) -> _Moments:
        return _moments(self.pixels_CHW, self._kind)


def pixel_correlation(recons_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
    """Return PixCorr: Pearson correlation of the flattened RGB pixels of each pair.

    A picture of one colour has no correlation (numpy gives NaN); it counts as 0 here, so that a reconstruction that
    collapsed lowers the mean instead of making it undefined. torchmetrics' definition is the same, and tests compare;
    its running sums make it several times slower, so it is not called here.

    Returns:
        (B,) float64 in [-1, 1].

    Source: MindEye2's final_evaluations notebook (np.corrcoef).
    """
    return _of_pairs(recons_BCHW, originals_BCHW, "2d", Picture.correlation)


def structural_similarity(recons_BCHW: Tensor, originals_BCHW: Tensor, kind: SsimKind = "2d") -> Tensor:
    """Return SSIM of the grey pictures of each pair, as scikit-image computes it for the field.

    ``2d`` is scikit-image >= 0.20 (and the textbook's SSIM): an 11 x 11 Gaussian window, the map cropped by 5 pixels.
    ``columns`` is what the same call did up to 0.19: the last axis was taken for channels, so it is the mean of one
    one-dimensional SSIM per pixel column. torchmetrics averages the whole map including a mirrored border, which is a
    third number; its map cropped by 5 pixels equals ``2d``.

    Returns:
        (B,) float64.

    Raises:
        ValueError: pictures smaller than the window.

    Source: Wang et al. (2004), equation 13, with scikit-image's ``gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1.0``.
    """
    return _of_pairs(recons_BCHW, originals_BCHW, kind, Picture.similarity)


def _of_pairs(
    firsts_BCHW: Tensor, seconds_BCHW: Tensor, kind: SsimKind, metric: Callable[[Picture, Picture], float]
) -> Tensor:
    """Return a metric of each pair, one pair at a time."""
    pairs = zip(firsts_BCHW, seconds_BCHW, strict=True)
    values = [metric(Picture(first_CHW, kind), Picture(second_CHW, kind)) for first_CHW, second_CHW in pairs]
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class _Moments:
    """One grey picture (H, W) with its filtered mean and filtered square."""

    grey_HW: Tensor
    mean: Tensor
    square: Tensor


def _moments(pixels_CHW: Tensor, kind: SsimKind) -> _Moments:
    """Return what SSIM needs of one picture, float64."""
    if min(pixels_CHW.shape[-2:]) < 2 * SSIM_RADIUS + 1:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(pixels_CHW.shape[-2:])}")
    red_HW, green_HW, blue_HW = pixels_CHW.double()
    grey_HW = (GREY_WEIGHTS[0] * red_HW).add_(green_HW, alpha=GREY_WEIGHTS[1]).add_(blue_HW, alpha=GREY_WEIGHTS[2])
    return _Moments(grey_HW, _filtered(grey_HW, kind), _filtered(grey_HW * grey_HW, kind))


def _ssim(x: _Moments, y: _Moments, kind: SsimKind) -> Tensor:
    """Return the SSIM of two grey pictures with data range 1."""
    c1, c2 = 0.01**2, 0.03**2
    mean_xy = x.mean * y.mean
    mean_xx_yy = (x.mean * x.mean).addcmul_(y.mean, y.mean)
    covariance = _filtered(x.grey_HW * y.grey_HW, kind).sub_(mean_xy)
    variances = (x.square + y.square).sub_(mean_xx_yy)
    numerator = mean_xy.mul_(2).add_(c1).mul_(covariance.mul_(2).add_(c2))
    denominator = mean_xx_yy.add_(c1).mul_(variances.add_(c2))
    return numerator.div_(denominator).mean()


def _filtered(map_HW: Tensor, kind: SsimKind) -> Tensor:
    """Return a map under the Gaussian window, only where the window fits whole."""
    columns = _gaussian_valid(map_HW, axis=0)
    return _gaussian_valid(columns, axis=1) if kind == "2d" else columns


def _gaussian_valid(map_HW: Tensor, axis: int) -> Tensor:
    """Filter along one axis where the window fits whole: sums of shifted maps, the same bits on any batch."""
    weights = [math.exp(-0.5 * (tap / SSIM_SIGMA) ** 2) for tap in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    total = math.fsum(weights)
    length = map_HW.shape[axis] - 2 * SSIM_RADIUS
    filtered = map_HW.narrow(axis, 0, length) * (weights[0] / total)
    for tap, weight in enumerate(weights[1:], start=1):
        filtered.add_(map_HW.narrow(axis, tap, length), alpha=weight / total)
    return filtered
