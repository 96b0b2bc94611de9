"""Z-scoring of betas, per session or over all sessions, fitted with or without the test images.

A voxel that is not finite somewhere in a session, or constant in it, is *invalid* in that session: it takes no part in
the fit and is zero (the mean) afterwards, so nothing divides by zero and the voxel keeps its place.

Shape suffixes: T trials of one session, N images, V voxels. Statistics are float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError


@dataclass(frozen=True)
class Scheme:
    """How betas are z-scored.

    Args:
        per_session: Fit in every session on its trials, or once on the means of images' trials in all sessions (see
            ``ImageMeans``).
        uses_test: Whether test trials take part in the fit.
        ddof: Degrees of freedom taken off the variance.
        text: For the index.
    """

    per_session: bool
    uses_test: bool
    ddof: int
    text: str


_SESSION_TRAIN = "z-score per session and voxel, fitted on the session's trials of images that are not shared"
SCHEMES = {
    "session-train": Scheme(True, False, 0, _SESSION_TRAIN),
    "mindeye1": Scheme(True, True, 0, "z-score per session and voxel, fitted on all trials of the session"),
    # the notebook MindEye2 published fits on all trials, and says in place that the paper's data were made like this
    "mindeye2": Scheme(True, False, 0, _SESSION_TRAIN),
    "brain-diffuser": Scheme(
        False, False, 1, "z-score per voxel, fitted on the training images' mean over their trials in all sessions"
    ),
}
"""By name. Source: the repositories of MindEye1 and MindEye2; Brain-Diffuser's prepare_nsddata.py and regressions."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of every voxel, each (V,)."""

    count: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    def std(self, ddof: int) -> npt.NDArray[np.float64]:
        """Return the standard deviation (V,); zero where it is undefined."""
        degrees = np.maximum(self.count - ddof, 1.0)
        return np.where(self.count > ddof, np.sqrt(self.squares / degrees), 0.0)


def invalid_voxels(betas_TV: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return which voxels (V,) are not finite somewhere or constant in a session."""
    with np.errstate(invalid="ignore"):
        is_constant = betas_TV.max(axis=0) == betas_TV.min(axis=0)
    return np.asarray(is_constant | ~np.isfinite(betas_TV).all(axis=0))


def fit(betas_TV: npt.NDArray[np.float32], is_fitted: npt.NDArray[np.bool_], where: str) -> Moments:
    """Return the moments of one session's fitted trials; invalid voxels have count 0.

    Raises:
        DataError: fewer than two trials can be fitted.
    """
    num_fitted = int(is_fitted.sum())
    if num_fitted < 2:
        raise DataError("A session has too few trials to be z-scored.", where=where, expected=2, found=num_fitted)
    is_valid = ~invalid_voxels(betas_TV)
    values = np.where(is_valid, betas_TV[is_fitted], 0.0).astype(np.float64)
    mean = values.mean(axis=0)
    squares = np.square(values - mean).sum(axis=0)
    return Moments(np.where(is_valid, float(num_fitted), 0.0), mean, squares)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all parts together, added in the given order (so the sum does not depend on ranks).

    Source: Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance".
    """
    merged, *others = parts
    for part in others:
        count = merged.count + part.count
        weight = np.divide(part.count, count, out=np.zeros_like(count), where=count > 0)
        delta = part.mean - merged.mean
        squares = merged.squares + part.squares + delta**2 * merged.count * weight
        merged = Moments(count, merged.mean + delta * weight, squares)
    return merged


def zscore(betas_TV: npt.NDArray[np.float32], moments: Moments, ddof: int) -> tuple[npt.NDArray[np.float32], int]:
    """Return z-scored betas (T, V) and the number of voxels that are invalid in this session (zero everywhere)."""
    std = moments.std(ddof)
    is_invalid = invalid_voxels(betas_TV) | (std <= 1e-6 * np.maximum(np.abs(moments.mean), 1.0))
    scale = np.where(is_invalid, 0.0, 1.0 / np.where(is_invalid, 1.0, std))
    finite_TV = np.where(is_invalid, np.float32(0), betas_TV)
    shift = np.where(is_invalid, 0.0, moments.mean)
    return ((finite_TV - shift) * scale).astype(np.float32), int(is_invalid.sum())


class ImageMeans:
    """Collects a subject's trials session by session, for a fit on the means over an image's trials.

    An image's trials lie in several sessions; only the sums of images of which trials are still to come are held (for
    a subject of NSD some hundred MB), never all betas. A voxel that is invalid in a session takes no part in the
    means of that session's trials.

    Args:
        image_ids: (all trials that will be added,) the image of each.
    """

    def __init__(self, image_ids: npt.NDArray[np.integer]) -> None:
        ids, counts = np.unique(image_ids, return_counts=True)
        self._to_come: dict[int, int] = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        self._begun: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]] = {}
        self._moments: Moments | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every trial was added."""
        return not self._to_come

    @property
    def moments(self) -> Moments:
        """The moments of all images' means, one value an image; there must be at least one."""
        assert self._moments is not None
        return self._moments

    def add(
        self,
        betas_TV: npt.NDArray[np.float32],
        image_ids: npt.NDArray[np.integer],
        is_fitted: npt.NDArray[np.bool_],
    ) -> None:
        """Add a session's trials (T, V); those that are not fitted only show which voxels are invalid."""
        is_valid = ~invalid_voxels(betas_TV)
        finished = []
        for trial in np.flatnonzero(is_fitted).tolist():
            image_id = int(image_ids[trial])
            if image_id not in self._begun:
                self._begun[image_id] = np.zeros(len(is_valid), np.float32), np.zeros(len(is_valid), np.uint8)
            sum_V, count_V = self._begun[image_id]
            sum_V += np.where(is_valid, betas_TV[trial], np.float32(0))
            count_V += is_valid
            self._to_come[image_id] -= 1
            if self._to_come[image_id] == 0:
                del self._to_come[image_id]
                finished.append(self._begun.pop(image_id))
        if finished:
            sums_NV, counts_NV = (np.stack(parts) for parts in zip(*finished, strict=True))
            part = _moments_of_means(sums_NV, counts_NV)
            self._moments = part if self._moments is None else merge([self._moments, part])


def _moments_of_means(sums_NV: npt.NDArray[np.float32], counts_NV: npt.NDArray[np.uint8]) -> Moments:
    """Return the moments of the means of images, given the sums and numbers of their valid trials."""
    is_valid = counts_NV > 0
    means_NV = sums_NV.astype(np.float64) / np.maximum(counts_NV, 1)  # zero where there is no valid trial
    count = is_valid.sum(axis=0).astype(np.float64)
    mean = means_NV.sum(axis=0) / np.maximum(count, 1.0)
    squares = np.square(np.where(is_valid, means_NV - mean, 0.0)).sum(axis=0)
    return Moments(count, mean, squares)
