"""FID and KID: equal to torchmetrics where it computes the same, unbiased and resampled as our bootstrap needs."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from nd_dist.metrics import distribution
from nd_dist.metrics.distribution import (
    frechet_distance,
    kernel_distance,
    kernel_distance_resampled,
    kernels,
)
from nd_dist.metrics.statistics.bootstrap import resample_counts


class Features(torch.nn.Module):
    num_features = 6

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def sets(num: int = 40, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num, 6)).astype(np.float32), (rng.standard_normal((num, 6)) + shift).astype(np.float32)


def test_kid_over_all_pictures_is_torchmetrics_with_one_subset_of_all() -> None:
    reals, recons = sets()
    metric = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=len(reals))
    metric.update(torch.from_numpy(reals).double(), real=True)
    metric.update(torch.from_numpy(recons).double(), real=False)
    assert kernel_distance(kernels(reals, recons)) == pytest.approx(float(metric.compute()[0]), abs=1e-6)


def test_fid_is_the_formula_of_two_gaussians() -> None:
    from scipy.linalg import sqrtm

    reals, recons = (rows.astype(np.float64) for rows in sets(200))
    covariances = [np.cov(rows, rowvar=False) for rows in (reals, recons)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((reals.mean(0) - recons.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(reals, recons) == pytest.approx(expected, rel=1e-6)


def test_blocks_do_not_change_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    reals, recons = sets()
    before = kernel_distance(kernels(reals, recons)), frechet_distance(reals, recons)
    monkeypatch.setattr(distribution, "BLOCK_ROWS", 7)
    assert (kernel_distance(kernels(reals, recons)), frechet_distance(reals, recons)) == pytest.approx(before)


def test_a_resample_counts_no_picture_against_its_own_copy() -> None:
    reals, recons = sets(12)
    counts = resample_counts(12, 5, 0)
    found = kernel_distance_resampled(kernels(reals, recons), counts)
    for row, value in zip(counts, found, strict=True):
        ids = np.repeat(np.arange(12), row)
        made = kernels(reals[ids], recons[ids])
        distinct = ids[:, None] != ids[None, :]
        among = [matrix[distinct].mean() for matrix in (made.reals_NN, made.recons_NN)]
        assert value == pytest.approx(sum(among) - 2 * made.cross_NN.mean())


def test_one_picture_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(np.zeros((1, 6)), np.zeros((1, 6)))
