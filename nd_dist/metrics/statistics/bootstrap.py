"""Intervals over images, by one bootstrap that all metrics share.

Legend: N images, B resamples. The same resamples serve every metric and point of a set of images, so differences
between points are paired. Sums that decide a number are exact or of fixed order: no bits depend on threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from nd_dist.metrics.identification import Distractors
from nd_dist.seeds import unit_seed

Float64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CONFIDENCE = 0.95
MIN_IMAGES = 10  # fewer give no interval: what a resample can be is then too coarse for one of 95 %


@dataclass(frozen=True)
class Difference:
    """A paired difference between two points, first minus second.

    Args:
        value: Difference of the metric on all images.
        ci_low, ci_high: Its interval (95 %); None with too few images.
        n: Images.
    """

    value: float
    ci_low: float | None
    ci_high: float | None
    n: int


def resample_counts(num_images: int, num_resamples: int, seed: int) -> Counts:
    """Return (B, N): how often each image is drawn in each resample (rows sum to N)."""
    rng = np.random.Generator(np.random.PCG64(unit_seed(seed, "bootstrap", num_images)))
    draws_BN = rng.integers(0, num_images, size=(num_resamples, num_images))
    offsets_B1 = np.arange(num_resamples)[:, None] * num_images
    counts = np.bincount((draws_BN + offsets_B1).ravel(), minlength=num_resamples * num_images)
    return counts.reshape(num_resamples, num_images).astype(np.int64)


def mean_of(values_N: Float64) -> float:
    """Return the mean of values, with an exact sum: the order of the images cannot matter."""
    return math.fsum(values_N.tolist()) / len(values_N)


def mean_resampled(values_N: Float64, counts_BN: Counts) -> Float64:
    """Return (B,) means of each resample."""
    return np.asarray((counts_BN * values_N).sum(axis=1) / values_N.shape[0], dtype=np.float64)


def two_way_of(wins_NN: npt.NDArray[np.integer], num_repeats: int = 1) -> float:
    """Return two-way identification from counts of wins.

    Args:
        wins_NN: Entry (k, j): how many repeats of pair j beat distractor k; the diagonal is 0.
        num_repeats: Repeats that were summed.
    """
    num = len(wins_NN)
    return float(int(wins_NN.sum()) / (num * (num - 1) * num_repeats))


def two_way_resampled(wins_NN: npt.NDArray[np.integer], counts_BN: Counts, num_repeats: int = 1) -> Float64:
    """Return (B,) two-way identification of each resample of *images*.

    An image enters both as a pair and as a distractor, so both sides are resampled together; a copy of an image is
    never its own distractor. Resampling only the per-image shares would hold the distractors fixed and give too
    narrow an interval.
    """
    weights_BN = counts_BN.astype(np.float64)  # whole numbers far below 2**53: every product and sum is exact
    won_B = ((weights_BN @ wins_NN.astype(np.float64)) * weights_BN).sum(axis=1)
    pairs_B = weights_BN.sum(axis=1) ** 2 - (weights_BN**2).sum(axis=1)
    # a resample that holds one image only has no distractor: it is at chance by definition (N = 2, 3 only)
    return np.where(pairs_B > 0, won_B / np.where(pairs_B > 0, pairs_B, 1.0) / num_repeats, 0.5)


def two_way_added(wins_NN: npt.NDArray[np.integer], distractors: Distractors, num_repeats: int = 1) -> Float64:
    """Return (N,) what each image adds to two-way identification, whose mean it is.

    With real distractors that is the share which the image's own reconstruction beats. Where reconstructions are each
    other's distractors, it is also what the image does to all others (Hajek's projection).
    """
    num = len(wins_NN)
    as_pair_N = wins_NN.sum(axis=0) / ((num - 1) * num_repeats)
    if distractors == "real":
        return np.asarray(as_pair_N, dtype=np.float64)
    as_distractor_N = wins_NN.sum(axis=1) / ((num - 1) * num_repeats)
    return np.asarray(as_pair_N + as_distractor_N - as_pair_N.mean(), dtype=np.float64)


def percentiles(values_B: Float64, num_images: int) -> tuple[float, float] | tuple[None, None]:
    """Return the ends of the 95 % interval of a resampled metric; none with fewer than ``MIN_IMAGES`` images.

    The plain percentile interval is too narrow with few images: its resamples vary by sqrt((N - 1) / N) too little,
    and normal quantiles stand where Student's belong. Percentiles further out make up for both.

    Source: Hesterberg (2015), "What teachers should know about the bootstrap", the expanded percentile interval.
    """
    if num_images < MIN_IMAGES:
        return None, None
    student = stdtrit(num_images - 1, (1 + CONFIDENCE) / 2)
    tail = 100 * float(ndtr(-math.sqrt(num_images / (num_images - 1)) * student))
    low, high = np.percentile(values_B, [tail, 100 - tail])
    return float(low), float(high)


def difference(first: tuple[float, Float64], second: tuple[float, Float64], num_images: int) -> Difference:
    """Return the paired difference of two points whose resamples were drawn together.

    Args:
        first, second: (value, (B,) resampled values) of each point, from the same ``resample_counts``.
        num_images: N.
    """
    low, high = percentiles(first[1] - second[1], num_images)
    return Difference(first[0] - second[0], low, high, num_images)
