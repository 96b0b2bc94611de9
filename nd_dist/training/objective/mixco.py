"""MixCo: mixing the voxels of a subject's samples within its global batch, with draws keyed by sample.

What is mixed with what follows from sample numbers alone, so every rank draws it for the whole batch on the host.

Legend of shape suffixes: B rows of this rank, N rows of the global batch, V voxels of the subject that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv
from torch.nn import functional as F

from nd_dist.models.draws import host_bits, host_doubles
from nd_dist.training.ranks import GlobalRows

BETA = 0.15
MIX_PROBABILITY = 0.5
PURPOSES = ("mixco/partner", "mixco/share", "mixco/select")


class Mix(NamedTuple):
    """How the rows of a global batch are mixed.

    Args:
        weight_N: Share of a row's own voxels, in [0, 1].
        partner_N: The row that the rest comes from.
        column_N: The column that the loss takes for its partner's.
    """

    weight_N: torch.Tensor
    partner_N: torch.Tensor
    column_N: torch.Tensor


def draw_mix(seed: int, micro_step: int, sizes: Sequence[int], is_released: bool) -> Mix:
    """Return the mix of a micro-step's rows, on the CPU.

    Args:
        seed, micro_step: Key the draws, with the numbers of the rows.
        sizes: Rows of every subject, which follow each other in the global batch.
        is_released: As released, the columns of every subject count from 0 although the rows of all subjects are
            concatenated, so that partners of later subjects point into the first one's block.
    """
    ids_N = np.arange(sum(sizes), dtype=np.int64)
    return mix_of(host_doubles(host_bits(seed, micro_step, PURPOSES, ids_N)), sizes, is_released)


def mix_of(uniform_3N: npt.NDArray[np.float64], sizes: Sequence[int], is_released: bool) -> Mix:
    """Return the mix that random numbers in [0, 1) stand for: they order partners, give shares, and say who is mixed.

    Partners are a permutation of a subject's rows; shares follow Beta(.15, .15), and half of the rows keep theirs.
    """
    partner_N, share_N, select_N = uniform_3N
    weight_N = np.where(select_N <= MIX_PROBABILITY, betaincinv(BETA, BETA, share_N), 1.0)
    edges = np.cumsum(sizes)[:-1]
    columns = [np.argsort(part, kind="stable") for part in np.split(partner_N, edges)]
    rows = np.concatenate([column + start for column, start in zip(columns, [0, *edges], strict=True)])
    chosen = np.concatenate(columns) if is_released else rows
    return Mix(torch.from_numpy(weight_N).float(), torch.from_numpy(rows), torch.from_numpy(chosen))


def voxels_of_all(voxels: Mapping[int, torch.Tensor], rows: GlobalRows) -> torch.Tensor:
    """Return the voxels (N, V) of all ranks' rows in one collective call, with zeros behind a subject's last one."""
    widest = max(own_BV.shape[1] for own_BV in voxels.values())
    return rows(torch.cat([F.pad(own_BV, (0, widest - own_BV.shape[1])) for own_BV in voxels.values()]))


def by_subject(
    rows_NV: torch.Tensor, voxels: Mapping[int, torch.Tensor], sizes: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return subject -> its rows of ``rows_NV``, as wide as they are in ``voxels``."""
    parts = torch.split(rows_NV, list(sizes))
    return {s: part[:, : own.shape[1]] for (s, own), part in zip(voxels.items(), parts, strict=True)}


def mixed(rows_NV: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Return every row's share of itself and of its partner."""
    share_N1 = mix.weight_N[:, None].to(rows_NV.dtype)
    return share_N1 * rows_NV + (1 - share_N1) * rows_NV[mix.partner_N]
