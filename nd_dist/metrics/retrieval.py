"""Retrieval: which picture belongs to a brain response, and which response to a picture, among k candidates.

Legend: N pictures, D feature values, K candidates of one draw. Named by direction: the field's "forward" and
"backward" are swapped between a released function and the text that prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nd_dist.seeds import unit_seed

Float64 = npt.NDArray[np.float64]

FIELD_CANDIDATES = 300
FIELD_DRAWS = 30


@dataclass(frozen=True)
class Retrieval:
    """Top-1 retrieval over several draws of candidates.

    Args:
        each: Accuracy of each draw in [0, 1].
        mean: Mean over the draws.
        ci_low, ci_high: Normal 95 % interval of that mean, 1.96 standard errors of the draws; it tells how much the
            draws vary, not how much the test images do.
        num_candidates: K; chance is 1 / K.
    """

    each: Float64
    mean: float
    ci_low: float
    ci_high: float
    num_candidates: int


def cosine_matrix(brains_ND: npt.NDArray[np.floating], images_ND: npt.NDArray[np.floating]) -> Float64:
    """Return (N, N) cosine of brain feature i (row) with image feature j (column); a zero row gives zeros."""
    return _unit_rows(brains_ND) @ _unit_rows(images_ND).T


def _unit_rows(features_ND: npt.NDArray[np.floating]) -> Float64:
    """Return flattened rows of norm 1 in float64."""
    rows_ND = np.asarray(features_ND, dtype=np.float64).reshape(len(features_ND), -1)
    norms_N1 = np.sqrt((rows_ND**2).sum(axis=1, keepdims=True))
    return np.asarray(rows_ND / np.where(norms_N1 == 0, 1.0, norms_N1), dtype=np.float64)


def image_hits(cosines_NN: Float64) -> npt.NDArray[np.bool_]:
    """Return (N,): given a brain response, is its own picture the most similar one ("image retrieval")?"""
    return np.asarray(cosines_NN.argmax(axis=1) == np.arange(len(cosines_NN)))


def brain_hits(cosines_NN: Float64) -> npt.NDArray[np.bool_]:
    """Return (N,): given a picture, is its own brain response the most similar one ("brain retrieval")?"""
    return image_hits(cosines_NN.T)


def draw_candidates(
    num_images: int, seed: int, num_candidates: int = FIELD_CANDIDATES, num_draws: int = FIELD_DRAWS
) -> npt.NDArray[np.int64]:
    """Return (draws, K) image positions, each draw without replacement.

    With fewer images than K all of them are candidates, and one draw says everything.
    """
    if num_images <= num_candidates:
        return np.arange(num_images, dtype=np.int64)[None]
    rng = np.random.Generator(np.random.PCG64(unit_seed(seed, "retrieval", num_images, num_candidates)))
    return np.stack([rng.permutation(num_images)[:num_candidates] for _ in range(num_draws)])


def retrieve(cosines_NN: Float64, picks_RK: npt.NDArray[np.integer], *, find: str) -> Retrieval:
    """Return top-1 retrieval over draws of candidates.

    Args:
        cosines_NN: Rows are brain responses, columns pictures.
        picks_RK: Candidate positions of each draw.
        find: ``image`` (given the brain response) or ``brain`` (given the picture).

    Source: MindEye2's final_evaluations notebook: 30 draws of 300, mean and 1.96 standard errors.
    """
    hits = {"image": image_hits, "brain": brain_hits}[find]
    each_R = np.array([hits(cosines_NN[np.ix_(pick, pick)]).mean() for pick in picks_RK])
    return Retrieval(each_R, float(each_R.mean()), *normal_interval(each_R), picks_RK.shape[1])


def normal_interval(each_R: Float64) -> tuple[float, float]:
    """Return the field's interval of a mean over draws: 1.96 standard errors on both sides."""
    mean, half = float(each_R.mean()), 1.96 * float(each_R.std()) / float(np.sqrt(len(each_R)))
    return mean - half, mean + half
