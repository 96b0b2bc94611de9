"""Pixel metrics of pairs of pictures: PixCorr and both kinds of SSIM, one float64 value per pair.

Legend: B pairs, C = 3 channels, H height, W width, P = H W pixels. Pixels are in [0,1]. Reductions run in float64 and
pair by pair, so a value never depends on what else is in the batch. Does not resize: see ``nd_dist.pixels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

SsimKind = Literal["2d", "columns"]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # int(3.5 * sigma + 0.5): scikit-image's truncation, an 11-tap window
GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # scikit-image's rgb2gray
BLOCK = 32  # rows of a map that are filtered at once: the quickest of 16 to 96
SAME_COLOUR = 1e-6  # pixels that differ by less were equal bytes, before they were resized


class Picture:
    """A picture that is compared with others: what a metric needs of it alone is computed once, not once a pair.

    Args:
        pixels_CHW: Pixels in [0,1]; the colours of a pixel may lie together (channels last).
        kind: Kind of SSIM.
    """

    def __init__(self, pixels_CHW: Tensor, kind: SsimKind = "2d") -> None:
        self.pixels_CHW, self._kind = pixels_CHW, kind

    def correlation(self, other: Picture) -> float:
        """Return PixCorr with a picture of the same size, see ``pixel_correlation``."""
        (first_P, first_norm), (second_P, second_norm) = self._deviations, other._deviations
        return float(first_P @ second_P) / (first_norm * second_norm)

    def similarity(self, other: Picture) -> float:
        """Return SSIM with a picture of the same size, see ``structural_similarity``."""
        return float(_ssim(self._moments, other._moments, self._kind))

    @cached_property
    def _flat_PC(self) -> Tensor:  # noqa: N802
        """The pixels (P, 3) in float64; quickest where they lie in memory as in a file (channels last)."""
        return self.pixels_CHW.detach().cpu().permute(1, 2, 0).flatten(0, 1).double().contiguous()

    @cached_property
    def _deviations(self) -> tuple[Tensor, float]:
        """Deviations (3 P,) of all numbers from their mean, and their norm; zeros and 1 of a picture of one colour."""
        flat = self._flat_PC.flatten()
        deviations = flat - flat.mean()
        norm = math.sqrt(deviations.dot(deviations))
        if norm <= SAME_COLOUR * math.sqrt(len(flat)) and float(flat.max() - flat.min()) <= SAME_COLOUR:
            return deviations.zero_(), 1.0
        return deviations, norm

    @cached_property
    def _moments(self) -> _Moments:
        grey_HW = (self._flat_PC @ torch.tensor(GREY_WEIGHTS, dtype=torch.float64)).view(self.pixels_CHW.shape[-2:])
        return _moments(grey_HW, self._kind)


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


def _moments(grey_HW: Tensor, kind: SsimKind) -> _Moments:
    """Return what SSIM needs of one picture, float64."""
    if min(grey_HW.shape) < 2 * SSIM_RADIUS + 1:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(grey_HW.shape)}")
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
    """Return a map (H, W) under the Gaussian window, only where the window fits whole; ``2d`` gives it transposed."""
    columns_HW = _gaussian_valid(map_HW)
    return _gaussian_valid(columns_HW.T) if kind == "2d" else columns_HW


def _gaussian_valid(map_HW: Tensor) -> Tensor:
    """Filter along the first axis where the window fits whole.

    Blocks of rows are multiplied with the window's band matrix: most of it is zeros, and yet it takes a third of the
    time of eleven passes over the map.
    """
    num_rows = len(map_HW) - 2 * SSIM_RADIUS
    filtered_HW = map_HW.new_empty(num_rows, map_HW.shape[1])
    band = _band()
    for start in range(0, num_rows, BLOCK):
        stop = min(start + BLOCK, num_rows)
        inputs = map_HW[start : stop + 2 * SSIM_RADIUS]
        torch.mm(band[: stop - start, : len(inputs)], inputs, out=filtered_HW[start:stop])
    return filtered_HW


@cache
def _band() -> Tensor:
    """Return the Gaussian window as a matrix (BLOCK, BLOCK + 10): a row holds it, shifted by the row's number."""
    weights = [math.exp(-0.5 * (tap / SSIM_SIGMA) ** 2) for tap in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    band = torch.zeros(BLOCK, BLOCK + 2 * SSIM_RADIUS, dtype=torch.float64)
    for row in range(BLOCK):
        band[row, row : row + len(weights)] = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    return band
