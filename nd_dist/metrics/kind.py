"""The kind of thing in a picture, as far as a linear probe reads it from embeddings (captions' above all).

A ridge classifier learns classes from true embeddings of training pictures; what it reads from decoded ones says how
much of the kind the decoder kept. Correlation hardly sees that: little of an embedding's variance is between classes.

Legend: N pictures, D feature values, K classes. Labels (N, K) are true where a class is in a picture; one class a
picture is scored by ``accuracy``, several by ``average_precision``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]
Labels = npt.NDArray[np.bool_]

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


@dataclass(frozen=True)
class Kind:
    """How well classes were read.

    Args:
        value: Accuracy, or average precision averaged over classes, in [0, 1].
        chance: What knowing nothing of the pictures gives.
        each: Hits (N,) of the pictures, or the average precision of each class that is in one of them.
    """

    value: float
    chance: float
    each: Float64


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


def accuracy(probe: Probe, features_ND: Features, labels_NK: Labels) -> Kind:
    """Return how often the class of the highest score is in the picture.

    Chance names the class that most training pictures have, whatever it looks at.
    """
    labels = np.asarray(labels_NK, dtype=bool)
    hits_N = labels[np.arange(len(labels)), probe.scores(features_ND).argmax(axis=1)]
    return Kind(float(hits_N.mean()), float(labels[:, probe.share_K.argmax()].mean()), hits_N.astype(np.float64))


def average_precision(probe: Probe, features_ND: Features, labels_NK: Labels) -> Kind:
    """Return the average precision of the classes that are in some of the pictures, and its mean.

    Pictures of equal scores count as one threshold, as in scikit-learn and torchmetrics. Chance is the exact
    expectation over all orders of the pictures, which is a little more than the share of pictures of a class.

    Raises:
        ValueError: no class is in any picture.
    """
    labels, scores = np.asarray(labels_NK, dtype=bool), probe.scores(features_ND)
    present = np.flatnonzero(labels.any(axis=0))
    if not len(present):
        raise ValueError("average precision needs a class that is in a picture")
    each = np.array([_precision(scores[:, k], labels[:, k]) for k in present])
    expected = [_expected_precision(len(labels), int(labels[:, k].sum())) for k in present]
    return Kind(float(each.mean()), float(np.mean(expected)), each)


def _precision(scores_N: Float64, has_N: Labels) -> float:
    """Return the average precision of one class: over its pictures, the precision of all that score no less."""
    own = scores_N[has_N]
    above = len(scores_N) - np.searchsorted(np.sort(scores_N), own)
    own_above = len(own) - np.searchsorted(np.sort(own), own)
    return float((own_above / above).mean())


def _expected_precision(num: int, own: int) -> float:
    """Return the mean average precision over all orders of ``num`` pictures, ``own`` of which have the class.

    At place r, precision is (1 + (r - 1) (own - 1) / (num - 1)) / r on average; a picture is at each place alike.
    """
    harmonic = float((1 / np.arange(1, num + 1)).sum()) / num
    return harmonic + (1 - harmonic) * (own - 1) / max(num - 1, 1)


def _rows(features_ND: Features) -> Float64:
    return np.asarray(features_ND, dtype=np.float64).reshape(len(features_ND), -1)
