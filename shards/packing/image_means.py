"""The moments of image means: what a z-scoring is fitted on that averages an image's trials first.

Trials come session by session, and an image's trials lie in several sessions; only the sums of images of which trials
are still to come are held (for one NSD subject some hundred megabytes), never all betas.

Shape suffixes: T trials of one session, N images, V voxels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.packing.normalize import Moments, invalid_voxels, merge


class ImageMeans:
    """Collects the trials of a subject.

    A voxel that is invalid in a session takes no part in the means of that session's trials.

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
            part = _moments(np.stack([sums for sums, _ in finished]), np.stack([counts for _, counts in finished]))
            self._moments = part if self._moments is None else merge([self._moments, part])


def _moments(sums_NV: npt.NDArray[np.float32], counts_NV: npt.NDArray[np.uint8]) -> Moments:
    """Return the moments of the means of images, given the sums and numbers of their valid trials."""
    is_valid = counts_NV > 0
    means_NV = sums_NV.astype(np.float64) / np.maximum(counts_NV, 1)  # zero where there is no valid trial
    count = is_valid.sum(axis=0).astype(np.float64)
    mean = means_NV.sum(axis=0) / np.maximum(count, 1.0)
    squares = np.square(np.where(is_valid, means_NV - mean, 0.0)).sum(axis=0)
    return Moments(count, mean, squares)
