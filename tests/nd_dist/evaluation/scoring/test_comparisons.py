"""Paired tests: what is compared with what, and the correction for many points."""

import numpy as np
import pytest
import torch

from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.scoring.comparisons import NO_GUIDANCE, RECIPE, comparisons, holm
from nd_dist.evaluation.scoring.score import Scores

RECIPE_POINT = Point(10.0, 0.5)


def scores(value: float, spread: float = 0.01) -> Scores:
    resampled = value + spread * np.random.default_rng(0).standard_normal(500)
    metric = {"value": value, "n": 20, "higher_is_better": True}
    return Scores({"pixcorr": metric, "fid": metric}, {"resampled.pixcorr": torch.from_numpy(resampled)})


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
    assert "fid" not in found[0]["differences"], "no resamples, no test"


def test_holm_is_the_hand_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
