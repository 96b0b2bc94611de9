"""Pixel metrics of pairs of pictures: PixCorr and both kinds of SSIM, one float64 value per pair.

Legend: B pairs, C = 3 channels, H height, W width. Pixels are in [0,1]. Reductions run in float64 and pair by pair, so
a value never depends on what else is in the batch. Does not resize: see ``nd_dist.frozen.pictures``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.regression import pearson_corrcoef

SsimKind = Literal["2d", "columns"]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5  # int(3.5 * sigma + 0.5): scikit-image's truncation, an 11-tap window
GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # scikit-image's rgb2gray


def pixel_correlation(recons_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
    """Return PixCorr: Pearson correlation of the flattened RGB pixels of each pair.

    A picture of one colour has no correlation (numpy gives NaN); it counts as 0 here, so that a reconstruction that
    collapsed lowers the mean instead of making it undefined.

    Returns:
        (B,) float64 in [-1, 1].

    Source: MindEye2's final_evaluations notebook (np.corrcoef); torchmetrics' definition is the same.
    """
    recons_PB = recons_BCHW.flatten(1).double().T
    originals_PB = originals_BCHW.flatten(1).double().T
    values = [_pearson(recons_PB[:, pair], originals_PB[:, pair]) for pair in range(recons_PB.shape[1])]
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def _pearson(recon_P: Tensor, original_P: Tensor) -> Tensor:
    """Return the correlation of two flat float64 pictures, 0 where one of them is constant."""
    if bool(recon_P.amax() == recon_P.amin()) or bool(original_P.amax() == original_P.amin()):
        return recon_P.new_zeros(())
    # centred first: torchmetrics' running sums then lose nothing, and correlation does not change
    value: Tensor = pearson_corrcoef(recon_P - recon_P.mean(), original_P - original_P.mean())
    return value


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
    if min(recons_BCHW.shape[-2:]) < 2 * SSIM_RADIUS + 1:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(recons_BCHW.shape[-2:])}")
    return torch.stack(
        [
            _ssim_of_pair(_grey(recon_CHW), _grey(original_CHW), kind)
            for recon_CHW, original_CHW in zip(recons_BCHW, originals_BCHW, strict=True)
        ]
    )


def _grey(pixels_CHW: Tensor) -> Tensor:
    """Return the luminance (H, W) float64 of one picture."""
    red_HW, green_HW, blue_HW = pixels_CHW.double()
    grey_HW: Tensor = GREY_WEIGHTS[0] * red_HW + GREY_WEIGHTS[1] * green_HW + GREY_WEIGHTS[2] * blue_HW
    return grey_HW


def _ssim_of_pair(x_HW: Tensor, y_HW: Tensor, kind: SsimKind) -> Tensor:
    """Return the SSIM of two grey pictures with data range 1."""
    c1, c2 = 0.01**2, 0.03**2
    moments_5HW = torch.stack([x_HW, y_HW, x_HW * x_HW, y_HW * y_HW, x_HW * y_HW])
    filtered_5HW = _gaussian_valid(moments_5HW, axis=1)
    if kind == "2d":
        filtered_5HW = _gaussian_valid(filtered_5HW, axis=2)
    mean_x, mean_y, xx, yy, xy = filtered_5HW
    numerator = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    similarity: Tensor = (numerator / denominator).mean()
    return similarity


def _gaussian_valid(maps_KHW: Tensor, axis: int) -> Tensor:
    """Filter along one axis where the window fits whole: sums of shifted maps, the same bits on any batch."""
    weights = [math.exp(-0.5 * (tap / SSIM_SIGMA) ** 2) for tap in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    total = math.fsum(weights)
    length = maps_KHW.shape[axis] - 2 * SSIM_RADIUS
    filtered = maps_KHW.narrow(axis, 0, length) * (weights[0] / total)
    for tap, weight in enumerate(weights[1:], start=1):
        filtered.add_(maps_KHW.narrow(axis, tap, length), alpha=weight / total)
    return filtered
