"""Two-way identification: worked examples, both directions, properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nd_dist.metrics.identification import (
    correlation_matrix,
    mean_correlation_wins,
    standardize_rows,
    two_way,
    two_way_each,
    wins,
)

# r[i, j] = correlation of real i with reconstruction j
WORKED = np.array([[0.9, 0.2, 0.6], [0.3, 0.5, 0.7], [0.1, 0.4, 0.6]])


def features(num: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reals = rng.standard_normal((num, 12))
    return reals, reals + noise * rng.standard_normal((num, 12))


def test_a_worked_example_with_real_distractors() -> None:
    # columns: .9 beats .3 .1 (2 of 2); .5 beats .2 .4 (2 of 2); .6 against .6 is a tie, against .7 a loss (0 of 2)
    assert two_way_each(WORKED).tolist() == [1.0, 1.0, 0.0]
    assert two_way(WORKED) == pytest.approx(4 / 6)


def test_the_same_example_with_reconstructions_as_distractors_gives_another_number() -> None:
    # rows: .9 beats .2 .6 (2); .5 beats .3 but not .7 (1); .6 beats .1 .4 (2)
    assert two_way_each(WORKED, "reconstruction").tolist() == [1.0, 0.5, 1.0]
    assert two_way(WORKED, "reconstruction") == pytest.approx(5 / 6)


def test_a_pair_never_beats_itself() -> None:
    assert not np.diag(wins(WORKED, "real")).any()
    assert not np.diag(wins(WORKED, "reconstruction")).any()


def test_it_is_the_fields_formula() -> None:
    reals, recons = features(9, 1)
    r = np.corrcoef(reals, recons)[:9, 9:]
    expected = np.mean((r < np.diag(r)).sum(0)) / 8
    assert two_way(correlation_matrix(reals, recons)) == expected


@settings(max_examples=25, deadline=None)
@given(num=st.integers(2, 14), seed=st.integers(0, 10_000), block=st.integers(1, 15))
def test_correlations_do_not_depend_on_the_block_size(num: int, seed: int, block: int) -> None:
    reals, recons = features(num, seed)
    expected = np.corrcoef(reals, recons)[:num, num:]
    assert correlation_matrix(reals, recons, block) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(num=st.integers(2, 12), seed=st.integers(0, 10_000))
def test_the_order_of_the_pictures_does_not_matter(num: int, seed: int) -> None:
    reals, recons = features(num, seed)
    order = np.random.default_rng(seed).permutation(num)
    for direction in ("real", "reconstruction"):
        before = two_way_each(correlation_matrix(reals, recons), direction)
        after = two_way_each(correlation_matrix(reals[order], recons[order]), direction)
        assert after.tolist() == before[order].tolist()


@settings(max_examples=25, deadline=None)
@given(num=st.integers(2, 12), seed=st.integers(0, 10_000), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_scale_and_offset_of_features_do_not_matter(num: int, seed: int, scale: float, shift: float) -> None:
    reals, recons = features(num, seed)
    before = correlation_matrix(reals, recons)
    assert correlation_matrix(scale * reals + shift, recons) == pytest.approx(before, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(num=st.integers(2, 12), seed=st.integers(0, 10_000))
def test_exact_reconstructions_always_win_and_swapping_roles_swaps_the_direction(num: int, seed: int) -> None:
    reals, recons = features(num, seed)
    assert two_way(correlation_matrix(reals, reals)) == 1.0
    forward, backward = correlation_matrix(reals, recons), correlation_matrix(recons, reals)
    assert two_way(forward, "real") == two_way(backward, "reconstruction")


def test_unrelated_features_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    matrix = correlation_matrix(rng.standard_normal((300, 40)), rng.standard_normal((300, 40)))
    assert two_way(matrix) == pytest.approx(0.5, abs=0.05)


def test_a_constant_feature_row_correlates_with_nothing_and_loses() -> None:
    reals, recons = features(4, 2)
    recons[1] = 3.0
    matrix = correlation_matrix(reals, recons)
    assert matrix[:, 1].tolist() == [0.0] * 4
    assert two_way_each(matrix)[1] == 0.0
    assert standardize_rows(np.ones((1, 5))).tolist() == [[0.0] * 5]


def test_one_picture_cannot_be_identified() -> None:
    with pytest.raises(ValueError, match="at least two"):
        two_way(np.ones((1, 1)))


@settings(max_examples=25, deadline=None)
@given(num=st.integers(2, 14), seed=st.integers(0, 10_000), repeats=st.integers(1, 3))
def test_fast_products_give_the_wins_of_exact_ones_and_equal_pictures_are_a_tie(
    num: int, seed: int, repeats: int
) -> None:
    rng = np.random.default_rng(seed)
    reals = rng.integers(0, 2, (num, 4)).astype(np.float32)  # equal rows and constant ones among them
    sets = [rng.integers(0, 3, (num, 4)).astype(np.float32) for _ in range(repeats)]
    exact = np.mean([correlation_matrix(reals, each) for each in sets], axis=0)
    is_equal = (reals[:, None] == reals[None]).all(axis=2)
    for distractors in ("real", "reconstruction"):
        found = mean_correlation_wins(reals, sets, distractors, torch.device("cpu"))
        is_clear = np.abs((exact if distractors == "real" else exact.T) - np.diag(exact)) > 1e-12
        assert (found == wins(exact, distractors))[is_clear].all()
        assert not found[is_equal].any() or distractors == "reconstruction"


def test_pairs_too_near_for_float32_are_decided_in_float64() -> None:
    rng = np.random.default_rng(0)
    reals = rng.standard_normal((40, 3000)).astype(np.float32)
    base = rng.standard_normal(3000)
    recons = (base + 1e-6 * rng.standard_normal((40, 3000))).astype(np.float32)  # all nearly the same
    for distractors in ("real", "reconstruction"):
        exact = wins(correlation_matrix(reals, recons), distractors)
        assert (mean_correlation_wins(reals, [recons], distractors, torch.device("cpu")) == exact).all()
