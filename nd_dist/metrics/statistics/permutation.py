"""Is a paired difference more than chance? A randomisation test that holds at any number of images and comparisons.

If two ways to reconstruct were the same, each image's difference could as well have had the other sign. So the signs
are flipped, the same way for all comparisons of a family, and a difference counts for as much as its place among what
flipping gives. Nothing is assumed of how differences are distributed. Legend: K comparisons, N images, F flips.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nd_dist.seeds import unit_seed

Float64 = npt.NDArray[np.float64]

NUM_FLIPS = 10_000
ALL_FLIPS = 13  # up to so many images every one of the 2**N flips is tried: the test is exact
ROUNDING = 1e-9


def flip_p_values(differences_KN: Float64) -> list[float]:
    """Return a two-sided p value of each comparison, corrected over all K of them.

    The correction compares each difference with the *largest* of the family under every flip (step-down): unlike
    Holm's it takes into account how alike the comparisons are, and does not shrink what a p value can reach.

    Args:
        differences_KN: Differences of each comparison, image by image; their mean is what is tested.

    Source: Westfall & Young (1993), step-down max-T; Fisher (1935) for flipping signs.
    """
    num = differences_KN.shape[1]
    lengths_K1 = np.sqrt((differences_KN**2).sum(axis=1, keepdims=True) * num)  # what no flip changes
    sums_KF = np.abs(differences_KN @ _flips(num).T)
    sizes_KF = np.divide(sums_KF, lengths_K1, out=np.zeros_like(sums_KF), where=lengths_K1 > 0)
    order = np.argsort(sizes_KF[:, 0], kind="stable")
    largest_KF = np.maximum.accumulate(sizes_KF[order], axis=0)
    shares_K = (largest_KF >= sizes_KF[order, :1] - ROUNDING).mean(axis=1)
    p_K = np.empty(len(order))
    p_K[order] = np.maximum.accumulate(shares_K[::-1])[::-1]
    return [float(p) for p in p_K]


@lru_cache(maxsize=1)
def _flips(num_images: int) -> Float64:
    """Return signs (F, N); the first row flips nothing."""
    if num_images <= ALL_FLIPS:
        numbers = np.arange(2**num_images)[:, None]
        flips_FN = 1.0 - 2.0 * (numbers >> np.arange(num_images) & 1)
    else:
        rng = np.random.Generator(np.random.PCG64(unit_seed(0, "flips", num_images)))
        flips_FN = 1.0 - 2.0 * rng.integers(0, 2, size=(NUM_FLIPS, num_images))
        flips_FN[0] = 1.0
    flips_FN.setflags(write=False)
    return np.asarray(flips_FN, dtype=np.float64)
