"""Two-way identification: is a reconstruction nearer to its own picture than to another one?

Legend: N pictures, D feature values. Both directions that the field uses are here, because they give different
numbers. Comparison is strict: a tie counts as a failure.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Distractors = Literal["real", "reconstruction"]
Float64 = npt.NDArray[np.float64]

BLOCK_ROWS = 256


class Rows(Protocol):
    """Feature rows that can be sliced: an array, a memory map, or something that reads a block from disk."""

    def __len__(self) -> int:
        """Return the number of rows N."""
        ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.floating]:
        """Return some rows (B, D)."""
        ...


def standardize_rows(features_ND: npt.NDArray[np.floating]) -> Float64:
    """Return rows with mean 0 and norm 1 in float64; a constant row becomes zero (it correlates with nothing)."""
    rows_ND = np.asarray(features_ND, dtype=np.float64)
    constant_N1 = rows_ND.max(axis=1, keepdims=True) == rows_ND.min(axis=1, keepdims=True)
    centred_ND = rows_ND - rows_ND.mean(axis=1, keepdims=True)
    norms_N1 = np.sqrt((centred_ND**2).sum(axis=1, keepdims=True))
    return np.where(constant_N1, 0.0, centred_ND / np.where(constant_N1, 1.0, norms_N1))


def correlation_matrix(reals_ND: Rows, recons_ND: Rows, block_rows: int = BLOCK_ROWS) -> Float64:
    """Return r (N, N): Pearson correlation of real picture i (row) with reconstruction j (column).

    Args:
        reals_ND: Features of the real pictures, flattened.
        recons_ND: Features of the reconstructions, same order.
        block_rows: Rows of each side that are in memory at a time.
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
