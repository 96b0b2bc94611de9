from __future__ import annotations

import torch
from scipy import stats

from nd_dist.models.draws import Draws
from nd_dist.training.objective.mixco import BETA, draw_mix, mix_voxels
from nd_dist.training.ranks import identity
from tests.nd_dist.training.virtual import VirtualRanks

COUNT = 8
VOXELS = {2: torch.randn(COUNT, 5), 7: torch.randn(COUNT, 3)}
IDS = torch.arange(2 * COUNT)


def test_partners_are_a_permutation_and_half_the_samples_stay_unmixed() -> None:
    weights = []
    for step in range(300):
        mix = draw_mix(Draws(0, step, IDS), IDS)
        assert sorted(mix.partner_M.tolist()) == IDS.tolist()
        weights.append(mix.weight_M)
    weight = torch.cat(weights).numpy()
    assert abs((weight == 1).mean() - 0.5) < 0.05
    for point in (0.001, 0.1, 0.5, 0.9):
        assert abs((weight <= point).mean() - 0.5 * stats.beta(BETA, BETA).cdf(point)) < 0.02


def test_every_row_is_its_share_of_itself_and_of_a_partner_of_its_own_subject() -> None:
    mix = mix_voxels(VOXELS, Draws(0, 5, IDS), IDS, identity, is_released=False)
    start = 0
    for subject, own in VOXELS.items():
        for i in range(COUNT):
            share, partner = float(mix.weight_N[start + i]), int(mix.column_N[start + i]) - start
            assert 0 <= partner < COUNT
            torch.testing.assert_close(mix.voxels[subject][i], share * own[i] + (1 - share) * own[partner])
        start += COUNT


def test_released_columns_of_later_subjects_point_into_the_first_ones_block() -> None:
    fixed = mix_voxels(VOXELS, Draws(0, 5, IDS), IDS, identity, is_released=False)
    released = mix_voxels(VOXELS, Draws(0, 5, IDS), IDS, identity, is_released=True)
    torch.testing.assert_close(released.column_N[:COUNT], fixed.column_N[:COUNT])
    torch.testing.assert_close(released.column_N[COUNT:], fixed.column_N[COUNT:] - COUNT)
    for subject in VOXELS:  # the voxels themselves are mixed alike
        torch.testing.assert_close(released.voxels[subject], fixed.voxels[subject])


def test_the_mix_is_the_same_on_one_two_and_four_ranks() -> None:
    whole = mix_voxels(VOXELS, Draws(0, 5, IDS), IDS, identity, is_released=False)
    for size in (2, 4):
        ranks = VirtualRanks(size)

        def act(rank: int, size: int = size, ranks: VirtualRanks = ranks) -> bool:
            place = torch.arange(rank, COUNT, size)  # strided: rows of ranks interleave in the global batch
            ids = torch.cat([place, COUNT + place])
            own = {subject: voxels[place] for subject, voxels in VOXELS.items()}
            part = mix_voxels(own, Draws(0, 5, ids), ids, ranks.gather_of(rank), is_released=False)
            torch.testing.assert_close(part.weight_N, whole.weight_N, rtol=0, atol=0)
            torch.testing.assert_close(part.column_N, whole.column_N, rtol=0, atol=0)
            for subject in VOXELS:
                torch.testing.assert_close(part.voxels[subject], whole.voxels[subject][place], rtol=0, atol=0)
            return True

        assert ranks.run(act) == [True] * size
