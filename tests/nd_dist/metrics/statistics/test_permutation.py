"""The randomisation test of paired differences: exact with few images, honest under the null, sharp for an effect."""

from itertools import product

import numpy as np
import pytest

from nd_dist.metrics.identification import Distractors, correlation_matrix, wins
from nd_dist.metrics.statistics.bootstrap import two_way_added
from nd_dist.metrics.statistics.permutation import flip_p_values

GRID = 35  # points of the paper's sweep: five guided kappas, seven etas


def test_with_few_images_the_p_value_is_the_share_of_all_sign_patterns_that_do_as_well() -> None:
    differences = np.random.default_rng(0).normal(0.4, 1, 8)
    sums = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=8)]
    share = np.mean([found >= abs(differences.sum()) - 1e-12 for found in sums])
    assert flip_p_values(differences[None]) == [pytest.approx(share)]


def test_a_perfect_effect_is_significant_at_every_point_of_the_papers_grid() -> None:
    assert max(flip_p_values(np.ones((GRID, 1000)))) == 1e-4
    assert max(flip_p_values(np.ones((GRID, 6)))) == 2 / 2**6
    mixed = np.random.default_rng(0).standard_normal((GRID, 1000))
    mixed[3] = 0.3 + mixed[3]
    found = flip_p_values(mixed)
    assert found[3] <= 0.001, "one effect among points without any"
    assert sum(p <= 0.05 for p in found) <= 2


def test_of_alike_points_each_is_tested_almost_as_if_it_were_alone() -> None:
    rng = np.random.default_rng(2)
    alone = rng.normal(0.35, 1, 40)
    alike = alone + 0.01 * rng.standard_normal((GRID, 40))
    assert flip_p_values(alike)[0] < 1.5 * flip_p_values(alone[None])[0] < flip_p_values(alone[None])[0] * GRID


def test_a_smaller_effect_never_has_a_smaller_p_value() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(np.linspace(0, 1, 9)[:, None], 1, (9, 12))
    sizes = np.abs(differences.sum(axis=1)) / np.sqrt((differences**2).sum(axis=1))
    found = np.array(flip_p_values(differences))[np.argsort(sizes)]
    assert (np.diff(found) <= 0).all()


def test_no_difference_at_all_has_the_p_value_one() -> None:
    assert flip_p_values(np.zeros((2, 5))) == [1.0, 1.0]


@pytest.mark.parametrize("num_images", [6, 8, 16, 32])
@pytest.mark.parametrize("kind", ["mean", "real", "reconstruction"])
def test_without_an_effect_at_most_six_in_a_hundred_families_have_a_p_value_up_to_five_hundredths(
    num_images: int, kind: Distractors
) -> None:
    rng, trials = np.random.default_rng(num_images), 300
    hits = 0
    for _ in range(trials):
        reals = rng.standard_normal((num_images, 40))
        sides = [reals + 6 * rng.standard_normal(reals.shape) for _ in range(4)]
        if kind == "mean":
            added = [side.mean(axis=1) for side in sides]
        else:
            won = [wins(correlation_matrix(reals, side), kind).astype(int) for side in sides]
            added = [two_way_added(each, kind) for each in won]
        hits += min(flip_p_values(np.stack([each - added[0] for each in added[1:]]))) <= 0.05
    assert hits <= 0.06 * trials + 2 * np.sqrt(0.05 * 0.95 * trials), "two standard errors of the simulation"
