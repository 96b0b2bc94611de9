"""Paired tests: what is compared with what, means over subjects and seeds, and the correction for many points."""

import numpy as np
import pytest

from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, NO_GUIDANCE, RECIPE, averages, comparisons
from nd_dist.metrics.statistics.bootstrap import mean_of, mean_resampled, percentiles
from nd_dist.metrics.statistics.scores import Scored, Scores, Statistics, kept_arrays, mean_of_scores

RECIPE_POINT = Point(10.0, 0.5)
STATISTICS = Statistics(500)
IDS = tuple(range(20))


def scores(value: float, image_ids: tuple[int, ...] = IDS, seed: int = 0) -> Scores:
    values = np.random.default_rng(seed).normal(value, 0.01, len(image_ids))
    pixcorr = Scored(
        mean_of(values), len(values), True, mean_resampled(values, STATISTICS.counts(len(values))), values
    )
    fid = Scored(value, len(values), False)
    found = {"pixcorr": pixcorr, "fid": fid}
    arrays = {key: array.numpy() for key, array in kept_arrays(found).items()}
    return Scores({name: item.as_json() for name, item in found.items()}, image_ids, arrays)


def test_every_guided_point_meets_no_guidance_and_all_meet_the_recipes_point() -> None:
    settings = (("seed", 1),)
    found = comparisons(
        {
            (1, Point(0.0, 0.0)): scores(0.1),
            (1, RECIPE_POINT): scores(0.3),
            (1, Point(20.0, 0.5)): scores(0.2),
            (1, Point(20.0, 0.5, settings)): scores(0.2),
            (1, Point(0.0, 0.0, control="nearest")): scores(0.4),
            (2, RECIPE_POINT): scores(0.3),
        },
        RECIPE_POINT,
    )
    pairs = [(Point.of(entry).name, entry["against"]) for entry in found]
    assert pairs == [
        ("kappa-10_eta-0.5", NO_GUIDANCE),
        ("kappa-20_eta-0.5", NO_GUIDANCE),
        ("kappa-20_eta-0.5", RECIPE),
        ("kappa-20_eta-0.5_seed-1", RECIPE),
        ("control-nearest", RECIPE),
    ], "another seed has no unguided point of its own, and subject 2 has one point only"
    assert found[0]["differences"]["pixcorr"]["value"] == pytest.approx(0.2)
    assert found[0]["differences"]["pixcorr"]["p"] <= 0.001
    assert "fid" not in found[0]["differences"], "no resamples, no test"


def test_points_on_other_images_are_not_compared() -> None:
    found = comparisons({(1, Point(0.0, 0.0)): scores(0.1), (1, RECIPE_POINT): scores(0.3, IDS[1:])}, RECIPE_POINT)
    assert [entry["differences"] for entry in found] == [{}]


def test_the_mean_over_subjects_is_that_of_the_hand_with_images_drawn_for_all_at_once() -> None:
    parts = [scores(0.1, seed=1), scores(0.4, seed=2)]
    found = averages({(1, RECIPE_POINT): parts[0], (2, RECIPE_POINT): parts[1]}, STATISTICS)
    assert list(found) == [(ALL_SUBJECTS, RECIPE_POINT)]
    metric = found[ALL_SUBJECTS, RECIPE_POINT].metrics["pixcorr"]
    by_hand = np.mean([part.arrays["added.pixcorr"] for part in parts], axis=0)
    assert metric["value"] == pytest.approx(by_hand.mean(), abs=1e-15)
    resampled = [by_hand[np.repeat(np.arange(20), counts)].mean() for counts in STATISTICS.counts(20)]
    assert (metric["ci_low"], metric["ci_high"]) == pytest.approx(percentiles(np.array(resampled), 20), abs=1e-12)
    assert metric["n"] == 20
    assert found[ALL_SUBJECTS, RECIPE_POINT].metrics["fid"]["value"] == pytest.approx(0.25)
    assert found[ALL_SUBJECTS, RECIPE_POINT].metrics["fid"]["ci_low"] is None


def test_subjects_that_saw_different_images_have_the_mean_of_their_values_and_an_interval_over_all_images() -> None:
    parts = [scores(0.1, IDS, seed=1), scores(0.4, IDS[:12], seed=2)]
    found = mean_of_scores(parts, STATISTICS)
    values = [part.metrics["pixcorr"]["value"] for part in parts]
    metric = found.metrics["pixcorr"]
    assert metric["value"] == pytest.approx(np.mean(values), abs=1e-15)
    assert found.arrays["added.pixcorr"].mean() == pytest.approx(np.mean(values), abs=1e-12)
    assert metric["ci_low"] < metric["value"] < metric["ci_high"]


def test_a_point_that_one_subject_lacks_has_no_mean_over_subjects() -> None:
    entries = {(1, RECIPE_POINT): scores(0.1), (2, RECIPE_POINT): scores(0.1), (1, Point(20.0, 0.5)): scores(0.2)}
    assert list(averages(entries, STATISTICS)) == [(ALL_SUBJECTS, RECIPE_POINT)]


def test_seeds_are_averaged_and_tested_by_their_mean_alone() -> None:
    entries = {
        (1, point.with_seed(seed) if seed else point): scores(value, seed=seed)
        for point, value in ((Point(0.0, 0.0), 0.1), (RECIPE_POINT, 0.3), (Point(20.0, 0.5), 0.2))
        for seed in (0, 1, 2)
    }
    means = averages(entries, STATISTICS)
    assert [point.seed for _, point in means] == ["mean of 3"] * 3
    found = comparisons({**means, **entries}, RECIPE_POINT)
    assert [(Point.of(entry).name, entry["against"]) for entry in found] == [
        ("kappa-10_eta-0.5_seed-mean-of-3", NO_GUIDANCE),
        ("kappa-20_eta-0.5_seed-mean-of-3", NO_GUIDANCE),
        ("kappa-20_eta-0.5_seed-mean-of-3", RECIPE),
    ]
