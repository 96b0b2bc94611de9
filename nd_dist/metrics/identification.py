"""Two-way identification: is a reconstruction nearer to its own picture than to another one?

Legend: N pictures, D feature values. Both directions that the field uses are here, because they give different
numbers. Comparison is strict: a tie counts as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Distractors = Literal["real", "reconstruction"]
Float64 = npt.NDArray[np.float64]

Features = npt.NDArray[np.floating]

BLOCK_ROWS = 256
NEAR = 1e-5  # correlations of float32 that differ by less are compared in float64; their rounding is a tenth of it
MOST_NEAR = 32  # pairs of a picture that are looked at again one by one; where there are more, all are


def standardize_rows(features_ND: Features) -> Float64:
    """Return rows with mean 0 and norm 1 in float64; a constant row becomes zero (it correlates with nothing)."""
    rows_ND = np.asarray(features_ND, dtype=np.float64)
    constant_N1 = rows_ND.max(axis=1, keepdims=True) == rows_ND.min(axis=1, keepdims=True)
    centred_ND = rows_ND - rows_ND.mean(axis=1, keepdims=True)
    norms_N1 = np.sqrt((centred_ND**2).sum(axis=1, keepdims=True))
    return np.where(constant_N1, 0.0, centred_ND / np.where(constant_N1, 1.0, norms_N1))


def correlation_matrix(reals_ND: Features, recons_ND: Features, block_rows: int = BLOCK_ROWS) -> Float64:
    """Return r (N, N): Pearson correlation of real picture i (row) with reconstruction j (column).

    Args:
        reals_ND: Features of the real pictures, flattened.
        recons_ND: Features of the reconstructions, same order.
        block_rows: Rows of each side that are in float64 at a time.
    """
    num = len(reals_ND)
    matrix_NN = np.empty((num, len(recons_ND)))
    for top in range(0, num, block_rows):
        reals_BD = standardize_rows(reals_ND[top : top + block_rows])
        for left in range(0, len(recons_ND), block_rows):
            recons_BD = standardize_rows(recons_ND[left : left + block_rows])
            matrix_NN[top : top + block_rows, left : left + block_rows] = reals_BD @ recons_BD.T
    return matrix_NN


def wins(correlations_NN: Float64, distractors: Distractors) -> npt.NDArray[np.bool_]:
    """Return a matrix (N, N) whose entry (k, j) says that pair j beats distractor k.

    ``real``: the distractors of reconstruction j are the other real pictures, r[k, j] < r[j, j] (MindEye,
    Brain-Diffuser). ``reconstruction``: the distractors of real picture j are the other reconstructions,
    r[j, k] < r[j, j] (Takagi, DynaDiff). The diagonal is False.
    """
    candidates_KJ = correlations_NN if distractors == "real" else correlations_NN.T
    return candidates_KJ < np.diag(correlations_NN)[None, :]


def mean_correlation_wins(
    reals_ND: Features, sets: Sequence[Features], distractors: Distractors, device: torch.device
) -> npt.NDArray[np.bool_]:
    """Return ``wins`` (N, N) of the mean correlation over some sets of reconstructions: as in float64, much faster.

    The products run on ``device`` in float32. Where two correlations are too near to each other to tell, they are
    computed again in float64.

    Args:
        reals_ND: Features of the real pictures.
        sets: Features (N, D) of one or more reconstructions of each.
        distractors: Whose features are the distractors.
        device: Where the products run.
    """
    reals = _standardized(reals_ND, device)
    means_NN = np.zeros((len(reals_ND), len(reals_ND)))
    for recons_ND in sets:
        means_NN += (reals @ _standardized(recons_ND, device).T).double().cpu().numpy() / len(sets)
    candidates_KJ = means_NN if distractors == "real" else means_NN.T
    is_near_KJ = np.abs(candidates_KJ - np.diag(means_NN)) < NEAR
    np.fill_diagonal(is_near_KJ, False)
    places = np.argwhere(is_near_KJ if distractors == "real" else is_near_KJ.T)
    if len(places) > MOST_NEAR * len(means_NN):
        exact_NN = sum(correlation_matrix(reals_ND, recons_ND) for recons_ND in sets) / len(sets)
        return wins(np.asarray(exact_NN), distractors)
    if len(places):
        own = np.arange(len(means_NN))
        places = np.concatenate([places, np.stack([own, own], axis=1)])
        means_NN[tuple(places.T)] = sum(_correlations(reals_ND, recons_ND, places) for recons_ND in sets) / len(sets)
    return wins(means_NN, distractors)


def _standardized(features_ND: Features, device: torch.device) -> torch.Tensor:
    """Return ``standardize_rows`` as float32 on a device."""
    rows_ND = torch.empty(features_ND.shape, device=device)
    for start in range(0, len(features_ND), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        wide_BD = torch.from_numpy(features_ND[block]).to(device).double()
        low_B, high_B = wide_BD.aminmax(dim=1)
        wide_BD -= wide_BD.mean(dim=1, keepdim=True)
        norms_B = torch.linalg.vector_norm(wide_BD, dim=1)
        rows_ND[block] = wide_BD * torch.where(low_B == high_B, 0.0, 1.0 / norms_B)[:, None]
    return rows_ND


def _correlations(reals_ND: Features, recons_ND: Features, places_P2: npt.NDArray[np.int64]) -> Float64:
    """Return the correlation of some (real, reconstruction) pairs in float64."""
    blocks = (places_P2[start : start + BLOCK_ROWS] for start in range(0, len(places_P2), BLOCK_ROWS))
    return np.concatenate(
        [
            (standardize_rows(reals_ND[block[:, 0]]) * standardize_rows(recons_ND[block[:, 1]])).sum(axis=1)
            for block in blocks
        ]
    )


def two_way_each(correlations_NN: Float64, distractors: Distractors = "real") -> Float64:
    """Return (N,), the share of the N - 1 distractors that each pair beats.

    Raises:
        ValueError: fewer than two pictures: there is nothing to compare with.
    """
    num = len(correlations_NN)
    if num < 2:
        raise ValueError("two-way identification needs at least two pictures")
    shares_N: Float64 = wins(correlations_NN, distractors).sum(axis=0) / (num - 1)
    return shares_N


def two_way(correlations_NN: Float64, distractors: Distractors = "real") -> float:
    """Return two-way identification in [0, 1]; chance is 0.5.

    Source: MindEye2's final_evaluations notebook (``two_way_identification``) for ``real``.
    """
    return float(two_way_each(correlations_NN, distractors).mean())
