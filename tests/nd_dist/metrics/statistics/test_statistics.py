"""Distance, agreement and the bootstrap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import correlation

from nd_dist.metrics.agreement import repeat_agreement
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, two_way_each, wins
from nd_dist.metrics.pixel import Picture, pixel_correlation
from nd_dist.metrics.statistics.bootstrap import (
    MIN_IMAGES,
    difference,
    mean_of,
    mean_resampled,
    percentiles,
    resample_counts,
    two_way_added,
    two_way_of,
    two_way_resampled,
)
from nd_dist.metrics.statistics.permutation import flip_p_values


def test_correlation_distance_is_scipys() -> None:
    rng = np.random.default_rng(0)
    reals, recons = rng.standard_normal((6, 9)), rng.standard_normal((6, 9))
    expected = [correlation(a, b) for a, b in zip(reals, recons, strict=True)]
    assert correlation_distance(reals, recons) == pytest.approx(expected, abs=1e-12)


def test_a_constant_row_is_at_distance_one() -> None:
    assert correlation_distance(np.ones((1, 4)), np.array([[1.0, 2.0, 3.0, 4.0]])).tolist() == [1.0]


def test_agreement_is_the_mean_over_all_pairs_of_repeats() -> None:
    repeats = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = np.mean([pixel_correlation(repeats[i : i + 1], repeats[j : j + 1]).item() for i, j in pairs])
    pictures = [Picture(pixels_CHW) for pixels_CHW in repeats]
    assert repeat_agreement(pictures, Picture.correlation) == pytest.approx(expected)
    assert repeat_agreement(pictures[:1] * 3, Picture.correlation) == pytest.approx(1.0)


def test_one_repeat_agrees_with_nothing() -> None:
    with pytest.raises(ValueError, match="two repeats"):
        repeat_agreement([Picture(torch.rand(3, 8, 8))], Picture.correlation)


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 40), resamples=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_resample_draws_as_many_images_as_there_are(num: int, resamples: int, seed: int) -> None:
    counts = resample_counts(num, resamples, seed)
    assert counts.shape == (resamples, num)
    assert (counts.sum(axis=1) == num).all()
    assert (counts == resample_counts(num, resamples, seed)).all()


def test_the_mean_does_not_depend_on_the_order_of_the_images() -> None:
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(1000).clip(max=15)
    assert mean_of(values) == mean_of(values[::-1].copy())


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = percentiles(mean_resampled(values, resample_counts(400, 2000, 0)), 400)
    assert low is not None
    assert high is not None
    assert low < mean_of(values) < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.1)


def test_few_images_give_no_interval_and_a_dozen_give_one_that_holds() -> None:
    rng, held = np.random.default_rng(3), 0
    assert percentiles(rng.standard_normal(100), MIN_IMAGES - 1) == (None, None)
    counts = resample_counts(12, 1000, 0)
    for _ in range(1000):
        low, high = percentiles(mean_resampled(rng.standard_normal(12), counts), 12)
        assert low is not None
        assert high is not None
        held += low < 0 < high
    assert 930 <= held <= 970, "the plain percentile interval holds the truth about 910 times"


def resampled_two_way_by_hand(correlations: np.ndarray, draws: np.ndarray) -> float:
    """Two-way identification of a resample, where a copy of an image is not its own distractor."""
    won = [correlations[i, j] < correlations[j, j] for j in draws for i in draws if i != j]
    return float(np.mean(won))


def test_two_way_resamples_pairs_and_distractors_together() -> None:
    rng = np.random.default_rng(0)
    reals = rng.standard_normal((7, 5))
    correlations = correlation_matrix(reals, reals + 1.5 * rng.standard_normal((7, 5)))
    counts = resample_counts(7, 30, 4)
    found = two_way_resampled(wins(correlations, "real").astype(int), counts)
    for row, value in zip(counts, found, strict=True):
        draws = np.repeat(np.arange(7), row)
        assert value == pytest.approx(resampled_two_way_by_hand(correlations, draws), abs=1e-12)


def test_wins_of_several_repeats_are_averaged() -> None:
    first, second = np.array([[0, 1], [1, 0]]), np.array([[0, 0], [1, 0]])
    assert two_way_of(first) == 1.0
    assert two_way_of(first + second, num_repeats=2) == 0.75


def test_a_resample_of_a_single_image_is_at_chance() -> None:
    assert two_way_resampled(np.array([[0, 1], [1, 0]]), np.array([[2, 0], [1, 1]])).tolist() == [0.5, 1.0]


def test_a_paired_difference_is_sharper_than_the_intervals_of_its_sides() -> None:
    rng = np.random.default_rng(2)
    easy = rng.normal(0.5, 0.3, size=200)
    better = easy + rng.normal(0.02, 0.02, size=200)
    counts = resample_counts(200, 1000, 0)
    sides = [(mean_of(values), mean_resampled(values, counts)) for values in (better, easy)]
    found = difference(sides[0], sides[1], 200)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert found.ci_low > 0
    assert found.ci_high - found.ci_low < 0.02
    same = difference(sides[1], sides[1], 200)
    assert (same.value, same.ci_low, same.ci_high) == (0.0, 0.0, 0.0)
    assert flip_p_values(np.stack([better - easy, easy - easy])) == [1e-4, 1.0]


def test_what_images_add_to_two_way_identification_is_its_mean_in_both_directions() -> None:
    rng = np.random.default_rng(4)
    reals = rng.standard_normal((9, 5))
    correlations = correlation_matrix(reals, reals + 3 * rng.standard_normal((9, 5)))
    for distractors in ("real", "reconstruction"):
        won = wins(correlations, distractors).astype(int)
        assert two_way_added(won, distractors).mean() == pytest.approx(two_way_of(won), abs=1e-15)
    shares = two_way_added(wins(correlations, "real").astype(int), "real")
    assert shares == pytest.approx(two_way_each(correlations, "real"))
