"""Partitions of 64 and 512 ranks, as pure functions: everything once, nobody idle, nothing depends on the size."""

import numpy as np
import pytest

from nd_dist.config import Config
from nd_dist.evaluation.points.units import grid_points, plan_bundles
from shards.reading.order import Order

SUBJECTS, LENGTHS = (1, 2, 5, 7), (27_000, 25_500, 27_000, 22_509)


@pytest.mark.parametrize("ranks", [64, 512])
def test_every_trial_is_read_once_per_pass_over_all_ranks(ranks: int) -> None:
    for subject, length in zip(SUBJECTS, LENGTHS, strict=True):
        steps = length // ranks  # whole steps of the first pass
        alone = Order(3, (subject,), (length,), (ranks,))
        read = [alone.slices(step, rank, ranks)[0].positions for step in range(0, steps, 7) for rank in range(ranks)]
        whole = [alone.slices(step, 0, 1)[0].positions for step in range(0, steps, 7)]
        assert np.array_equal(np.concatenate(read), np.concatenate(whole))
        assert len(np.unique(np.concatenate(read))) == sum(map(len, read))


@pytest.mark.parametrize("ranks", [64, 512])
def test_packing_shares_units_out_evenly(ranks: int) -> None:
    units = list(range(8 * 40 + 8 * 144))
    shares = [units[rank::ranks] for rank in range(ranks)]  # as shards.packing.pack does
    assert sorted(unit for share in shares for unit in share) == units
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", [64, 512])
def test_a_sweep_has_work_for_every_rank_and_ranks_begin_apart(ranks: int) -> None:
    groups = plan_bundles(grid_points(Config()), {1: range(1000)}, batch_size=4)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    assert len(groups) >= ranks
    firsts = [rank * len(groups) // ranks for rank in range(ranks)]  # as nd_dist.evaluation.run does
    assert len(set(firsts)) == ranks
