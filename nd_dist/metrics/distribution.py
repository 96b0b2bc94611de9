"""FID and KID: how far the *set* of reconstructions is from the set of originals. Neither looks at pairs.

Legend: N pictures, D feature values, B bootstrap resamples. FID's estimate is biased and far too large with fewer
pictures than features; KID is unbiased at any N, and is the one to read with few test images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.metrics.identification import Features
from nd_dist.metrics.statistics.bootstrap import Counts, Float64

BLOCK_ROWS = 256
DEGREE, COEFFICIENT = 3, 1.0


class _Given(torch.nn.Module):
    """Stands where torchmetrics puts its network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Return the features themselves."""
        return features_BD


def frechet_distance(reals_ND: Features, recons_ND: Features) -> float:
    """Return FID of two sets of features, streamed in blocks, float64.

    Raises:
        ValueError: fewer than two pictures.

    Source: Heusel et al. (2017); torchmetrics' ``FrechetInceptionDistance``.
    """
    if min(len(reals_ND), len(recons_ND)) < 2:
        raise ValueError("FID needs at least two pictures")
    from torchmetrics.image.fid import FrechetInceptionDistance  # half a second that no report should wait for

    metric = FrechetInceptionDistance(feature=_Given(reals_ND[0:1].shape[1])).set_dtype(torch.float64)
    for rows, is_real in ((reals_ND, True), (recons_ND, False)):
        for start in range(0, len(rows), BLOCK_ROWS):
            block_BD = np.asarray(rows[start : start + BLOCK_ROWS], dtype=np.float64)
            metric.update(torch.from_numpy(block_BD), real=is_real)
    return float(metric.compute())


@dataclass(frozen=True)
class Kernels:
    """Polynomial kernels (N, N) among reals, among reconstructions, and of real i (row) with reconstruction j."""

    reals_NN: Float64
    recons_NN: Float64
    cross_NN: Float64


def kernels(reals_ND: Features, recons_ND: Features) -> Kernels:
    """Return the kernels of KID, (x . y / D + 1)**3, computed in blocks of rows."""
    return Kernels(_kernel(reals_ND, reals_ND), _kernel(recons_ND, recons_ND), _kernel(reals_ND, recons_ND))


def _kernel(left_ND: Features, right_ND: Features) -> Float64:
    matrix_NN = np.empty((len(left_ND), len(right_ND)))
    for top in range(0, len(left_ND), BLOCK_ROWS):
        left_BD = np.asarray(left_ND[top : top + BLOCK_ROWS], dtype=np.float64)
        for start in range(0, len(right_ND), BLOCK_ROWS):
            right_BD = np.asarray(right_ND[start : start + BLOCK_ROWS], dtype=np.float64)
            products = left_BD @ right_BD.T / left_BD.shape[1] + COEFFICIENT
            matrix_NN[top : top + BLOCK_ROWS, start : start + BLOCK_ROWS] = products**DEGREE
    return matrix_NN


def kernel_distance(found: Kernels) -> float:
    """Return KID, the unbiased squared maximum mean discrepancy over all N pictures.

    torchmetrics draws random subsets and averages them; with one subset of all pictures the numbers are equal.

    Source: Binkowski et al. (2018).
    """
    everything_1N = np.ones((1, len(found.reals_NN)), dtype=np.int64)
    return float(kernel_distance_resampled(found, everything_1N)[0])


def kernel_distance_resampled(found: Kernels, counts_BN: Counts) -> Float64:
    """Return (B,) KID of each resample of images; a copy of a picture is never compared with itself."""
    weights_BN = counts_BN.astype(np.float64)
    num_B = weights_BN.sum(axis=1)
    distinct_B = num_B**2 - (weights_BN**2).sum(axis=1)
    among = [
        _weighted_sum(matrix_NN - np.diag(np.diag(matrix_NN)), weights_BN) / np.where(distinct_B > 0, distinct_B, 1.0)
        for matrix_NN in (found.reals_NN, found.recons_NN)
    ]
    between_B = _weighted_sum(found.cross_NN, weights_BN) / num_B**2
    return np.asarray(among[0] + among[1] - 2.0 * between_B, dtype=np.float64)


def _weighted_sum(matrix_NN: Float64, weights_BN: npt.NDArray[np.float64]) -> Float64:
    """Return (B,) sums of the matrix's entries, each times the counts of its row and column."""
    return np.asarray(((weights_BN @ matrix_NN) * weights_BN).sum(axis=1), dtype=np.float64)
