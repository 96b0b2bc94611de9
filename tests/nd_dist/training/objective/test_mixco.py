from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nd_dist.training.objective.mixco import BETA, by_subject, draw_mix, mixed, voxels_of_all
from nd_dist.training.ranks import GlobalRows
from nd_dist.world import World
from tests.nd_dist.training.virtual import VirtualRanks

COUNT = 8
VOXELS = {2: torch.randn(COUNT, 5), 7: torch.randn(COUNT, 3)}
SIZES = (COUNT, COUNT)


def test_partners_are_a_permutation_of_each_subject_and_half_the_samples_stay_unmixed() -> None:
    weights = []
    for step in range(300):
        mix = draw_mix(0, step, SIZES, is_released=False)
        assert sorted(mix.partner_N[:COUNT].tolist()) == list(range(COUNT))
        assert sorted(mix.partner_N[COUNT:].tolist()) == list(range(COUNT, 2 * COUNT))
        assert torch.equal(mix.column_N, mix.partner_N)
        weights.append(mix.weight_N)
    weight = torch.cat(weights).numpy()
    assert abs((weight == 1).mean() - 0.5) < 0.05
    for point in (0.001, 0.1, 0.5, 0.9):
        assert abs((weight <= point).mean() - 0.5 * stats.beta(BETA, BETA).cdf(point)) < 0.02


def test_every_row_is_its_share_of_itself_and_of_a_partner_of_its_own_subject() -> None:
    mix = draw_mix(0, 5, SIZES, is_released=False)
    found = by_subject(mixed(voxels_of_all(VOXELS, GlobalRows(2 * COUNT)), mix), VOXELS, SIZES)
    start = 0
    for subject, own in VOXELS.items():
        for i in range(COUNT):
            share, partner = float(mix.weight_N[start + i]), int(mix.partner_N[start + i]) - start
            torch.testing.assert_close(found[subject][i], share * own[i] + (1 - share) * own[partner])
        start += COUNT


def test_released_columns_of_later_subjects_point_into_the_first_ones_block() -> None:
    fixed, released = (draw_mix(0, 5, SIZES, is_released) for is_released in (False, True))
    torch.testing.assert_close(released.column_N[:COUNT], fixed.column_N[:COUNT])
    torch.testing.assert_close(released.column_N[COUNT:], fixed.column_N[COUNT:] - COUNT)
    torch.testing.assert_close(released.partner_N, fixed.partner_N)  # the voxels themselves are mixed alike


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 20])
def test_every_rank_sees_the_voxels_of_all_rows_in_one_order_and_finds_its_own_again(size: int) -> None:
    ranks = VirtualRanks(size)
    whole = torch.cat([torch.nn.functional.pad(own, (0, 5 - own.shape[1])) for own in VOXELS.values()])

    def act(rank: int) -> bool:
        rows = GlobalRows(2 * COUNT, World(rank, size), ranks.gather_of(rank))
        counts, own, start = rows.counts(SIZES), {}, 0
        assert sum(counts) == rows.per_rank
        place = np.minimum(rows.ids, 2 * COUNT - 1)
        for (subject, voxels), count in zip(VOXELS.items(), counts, strict=True):
            own[subject] = whole[place[start : start + count], : voxels.shape[1]]
            start += count
        found = voxels_of_all(own, rows)
        assert torch.equal(found, whole)
        again = by_subject(rows.by_rank(found)[rank], own, counts)
        real = rows.num_own
        assert torch.equal(torch.cat([a.flatten() for a in again.values()])[: real * 3], torch.cat(
            [a.flatten() for a in own.values()])[: real * 3])  # fmt: skip
        return True

    assert ranks.run(act) == [True] * size
