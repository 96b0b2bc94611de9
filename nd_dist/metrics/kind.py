"""The kind of thing in a picture, as far as a linear probe reads it from embeddings (captions' above all).

A ridge classifier learns classes from true embeddings of training pictures; what it reads from decoded ones says how
much of the kind the decoder kept. Correlation hardly sees that: little of an embedding's variance is between classes.

Legend: N pictures, D feature values, K classes. Labels (N, K) are true where a class is in a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]
Classes = Mapping[str, Sequence[int]]
"""Class -> ids of the images that show it."""

PROBE_IMAGES = 2000
"""Training pictures that a probe learns from, at most."""

MULTIPLES = tuple(np.logspace(-4, 3, 29).tolist())
"""Penalties that are tried, as multiples of the mean squared singular value of the features."""
NULL = 1e-10
"""Directions whose squared singular value is below this share of the largest one's carry rounding."""


@dataclass(frozen=True)
class Probe:
    """A fitted classifier.

    Args:
        mean_D: Mean features of the training pictures.
        slope_DK: From centred features to the scores of classes.
        share_K: Share of the training pictures that a class is in; the score of a picture of mean features.
        penalty: What was added to the squared singular values.
    """

    mean_D: Float64
    slope_DK: Float64
    share_K: Float64
    penalty: float

    def scores(self, features_ND: Features) -> Float64:
        """Return (N, K): the higher, the more a class is in a picture."""
        return np.asarray((_rows(features_ND) - self.mean_D) @ self.slope_DK + self.share_K)


def fit_probe(features_ND: Features, labels_NK: Labels) -> Probe:
    """Return the classifier of training pictures, its penalty chosen by the leave-one-out squared error.

    Args:
        features_ND: True embeddings (N, ...) of training pictures, flattened here.
        labels_NK: Their classes.

    Raises:
        ValueError: there are fewer than three pictures, other labels than pictures, or features that are not finite
            or equal in all pictures.
    """
    rows_ND, labels = _rows(features_ND), np.asarray(labels_NK, dtype=np.float64)
    if len(rows_ND) < 3 or labels.shape[:1] != rows_ND.shape[:1]:
        raise ValueError(f"a probe needs three pictures with their labels, got {len(rows_ND)} and {len(labels)}")
    if not np.isfinite(rows_ND).all():
        raise ValueError("a probe needs finite features")
    mean_D, share_K = rows_ND.mean(axis=0), labels.mean(axis=0)
    squares, vectors_NR = np.linalg.eigh((rows_ND - mean_D) @ (rows_ND - mean_D).T)
    kept = squares > NULL * squares[-1]
    if squares[-1] <= NULL**2 * np.square(rows_ND).sum():
        raise ValueError("a probe needs features that differ from picture to picture")
    squares_R, left_NR = squares[kept], vectors_NR[:, kept]
    scores_RK = left_NR.T @ (labels - share_K)

    def left_out_error(penalty: float) -> float:
        """Squared error of each picture in a fit without it (Allen 1974, PRESS)."""
        shrink_R = squares_R / (squares_R + penalty)
        residual_NK = labels - share_K - left_NR @ (shrink_R[:, None] * scores_RK)
        leverage_N = left_NR**2 @ shrink_R + 1 / len(rows_ND)
        return float(np.square(residual_NK / np.maximum(1 - leverage_N, 1e-12)[:, None]).sum())

    penalty = min((multiple * float(squares_R.mean()) for multiple in MULTIPLES), key=left_out_error)
    slope_DK = (rows_ND - mean_D).T @ (left_NR @ (scores_RK / (squares_R + penalty)[:, None]))
    return Probe(mean_D, slope_DK, share_K, penalty)


def labels_of(classes: Classes, image_ids: Sequence[int]) -> Labels:
    """Return (N, K): which class is in which image."""
    return np.stack([np.isin(image_ids, members) for members in classes.values()], axis=1)


def probe_images(classes: Classes, image_ids: Sequence[int]) -> list[int]:
    """Return the images of some, evenly spaced and no more than a probe needs, that show one of the classes."""
    known = {image_id for members in classes.values() for image_id in members}
    ids = [image_id for image_id in image_ids if image_id in known]
    return ids[:: max(1, -(-len(ids) // PROBE_IMAGES))]


def each_picture(scores_NK: Float64, labels_NK: Labels) -> Float64:
    """Return (N,) in [0, 1]: how well the scores tell the classes of each picture.

    Where every picture has one class: 1 if the highest score is its own, else 0 (the mean is the accuracy). Where
    pictures have several: the average precision of a picture's classes among all, those of equal scores sharing the
    last of their places (the mean is the label ranking average precision, as in scikit-learn). A picture without a
    class adds the mean of the others. Chance is what ``probe.share_K`` as everybody's scores gets.

    Raises:
        ValueError: no picture has a class.
    """
    labels = np.asarray(labels_NK, dtype=bool)
    scores, has_class = np.broadcast_to(scores_NK, labels.shape), labels.any(axis=1)
    if not has_class.any():
        raise ValueError("no picture has one of the classes")
    if (labels[has_class].sum(axis=1) == 1).all():
        each_N: Float64 = labels[np.arange(len(labels)), scores.argmax(axis=1)].astype(np.float64)
    else:
        each_N = np.zeros(len(labels))
        each_N[has_class] = [_precision(scores[row], labels[row]) for row in np.flatnonzero(has_class)]
    each_N[~has_class] = each_N[has_class].mean()
    return each_N


def _precision(scores_K: Float64, has_K: Labels) -> float:
    """Return the mean over a picture's classes of the precision among all classes that score no less."""
    own = scores_K[has_K]
    above = len(scores_K) - np.searchsorted(np.sort(scores_K), own)
    own_above = len(own) - np.searchsorted(np.sort(own), own)
    return float((own_above / above).mean())


def _rows(features_ND: Features) -> Float64:
    return np.asarray(features_ND, dtype=np.float64).reshape(len(features_ND), -1)
