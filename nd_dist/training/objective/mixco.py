"""MixCo: mixing the voxels of a subject's samples within its global batch, with draws keyed by sample.

Legend of shape suffixes: B rows of this rank, M rows of one subject in the global batch, N rows of the global batch,
V voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.special import betaincinv

from nd_dist.models.draws import Draws
from nd_dist.training.ranks import Gather, GlobalRows

BETA = 0.15
MIX_PROBABILITY = 0.5


class SubjectMix(NamedTuple):
    """How one subject's rows (by sample id) are mixed: the partner's row (M,), and the own share (M,) in [0, 1]."""

    partner_M: torch.Tensor
    weight_M: torch.Tensor


class Mix(NamedTuple):
    """The mix of a step: mixed voxels of this rank, and for the global batch the own share and partner's column."""

    voxels: dict[int, torch.Tensor]
    weight_N: torch.Tensor
    column_N: torch.Tensor


def draw_mix(draws: Draws, sample_id_M: torch.Tensor) -> SubjectMix:
    """Return the partners (a permutation) and shares (Beta(.15, .15); half of them 1) of a subject's samples."""
    drawn = draws.for_samples(sample_id_M)
    partner_M = torch.argsort(drawn.uniform_double("mixco/partner"))
    uniform_M = drawn.uniform_double("mixco/share")
    share_M = torch.from_numpy(betaincinv(BETA, BETA, uniform_M.cpu().numpy())).to(uniform_M.device)
    is_mixed_M = drawn.uniform_double("mixco/select") <= MIX_PROBABILITY
    return SubjectMix(partner_M, torch.where(is_mixed_M, share_M, 1.0).float())


def mix_voxels(
    voxels: Mapping[int, torch.Tensor], draws: Draws, sample_id_B: torch.Tensor, gather: Gather, is_released: bool
) -> Mix:
    """Return this rank's mixed voxels and the shares and columns of the global batch.

    Args:
        voxels: Subject -> (B_s, V_s) of this rank.
        draws: The step's random numbers.
        sample_id_B: Ids of this rank's rows, in the mapping's order.
        gather: How rows of all ranks are collected; partners may live on another rank.
        is_released: As released, the columns of every subject count from 0 although the rows of all subjects are
            concatenated, so that partners of later subjects point into the first one's block.
    """
    all_rows = GlobalRows(gather, sample_id_B)
    weight_N = torch.empty(len(all_rows.sample_id_N), device=sample_id_B.device)
    column_N = torch.empty(len(all_rows.sample_id_N), dtype=torch.int64, device=sample_id_B.device)
    mixed: dict[int, torch.Tensor] = {}
    start = 0
    for subject, own_BV in voxels.items():
        rows = GlobalRows(gather, sample_id_B[start : start + len(own_BV)])
        start += len(own_BV)
        mix = draw_mix(draws, rows.sample_id_N)
        partners_BV = rows(own_BV)[mix.partner_M[rows.own_B]]
        share_B1 = mix.weight_M[rows.own_B][:, None].to(own_BV.dtype)
        mixed[subject] = share_B1 * own_BV + (1 - share_B1) * partners_BV
        place_M = torch.searchsorted(all_rows.sample_id_N, rows.sample_id_N)
        weight_N[place_M] = mix.weight_M
        column_N[place_M] = mix.partner_M if is_released else place_M[mix.partner_M]
    return Mix(mixed, weight_N, column_N)
