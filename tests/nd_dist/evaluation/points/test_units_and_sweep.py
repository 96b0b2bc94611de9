"""Points, groups and the choice of a point: pure values."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.points.axes import check_axes
from nd_dist.evaluation.points.units import (
    Point,
    config_points,
    control_points,
    distinct_points,
    grid_points,
    grid_settings,
    image_name,
    plan_bundles,
    subject_name,
)
from nd_dist.evaluation.sweep import select


@given(
    images=st.dictionaries(st.integers(1, 8), st.sets(st.integers(0, 72_999), min_size=1, max_size=30), max_size=3),
    batch_size=st.integers(1, 9),
)
def test_every_image_of_every_point_is_in_one_bundle(images: dict[int, set[int]], batch_size: int) -> None:
    points = (Point(0.0, 0.0), Point(300.0, 0.5))
    bundles = plan_bundles(points, {subject: sorted(ids) for subject, ids in images.items()}, batch_size)
    units = [(each.subject, point, image) for each in bundles for point in each.points for image in each.image_ids]
    assert len(units) == len(set(units)) == 2 * sum(map(len, images.values()))
    assert len({bundle.name for bundle in bundles}) == len(bundles)
    assert all(len(bundle.image_ids) <= batch_size for bundle in bundles)


def test_points_of_one_kappa_and_its_settings_are_made_together() -> None:
    settings = (("sampler.cfg_scale", 3.0),)
    points = (Point(0.0, 0.0), Point(1.0, 0.9), Point(1.0, 0.2), Point(1.0, 0.2, settings), Point(2.0, 0.2))
    groups = plan_bundles(points, {1: [5]}, 4)
    assert [[point.eta for point in group.points] for group in groups] == [[0.0], [0.2, 0.9], [0.2], [0.2]]


def test_a_grid_has_every_combination_of_its_axes_and_the_recipes_own_values_are_no_setting() -> None:
    axes = {"kappa": [1.0], "eta": [0.5], "sag": [0.0, 0.75], "seed": [0, 1], "axes": {"frozen.antialias": [True]}}
    config = Config.model_validate({"sampler": {"sag_scale": 0.75}, "sweep": axes})
    assert [dict(settings) for settings in grid_settings(config)] == [
        {"frozen.antialias": True, "sampler.sag_scale": 0.0},
        {"frozen.antialias": True, "sampler.sag_scale": 0.0, "seed": 1},
        {"frozen.antialias": True},
        {"frozen.antialias": True, "seed": 1},
    ]
    assert len(grid_points(config)) == 4 * 2, "each combination with and without guidance"
    assert {point.name for point in grid_points(config)} >= {"unguided_antialias-True_sag_scale-0_seed-1"}


def test_an_axis_that_training_would_have_to_follow_is_refused_with_what_to_do() -> None:
    for axes, message in [
        ({"training.steps": [1]}, "nd merge"),
        ({"sampler.kapa": [1.0]}, "cannot vary"),
        ({"sampler.kappa": [1.0]}, "sweep.kappa"),
        ({"sampler.strength": [7.0]}, "not allowed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_axes(Config.model_validate({"sweep": {"axes": axes}}))
    check_axes(Config.model_validate({"sweep": {"axes": {"sampler.strength": [0.5]}, "seed": [1, 2]}}))


def test_the_controls_are_on_by_one_flag() -> None:
    off = Config.model_validate({"sampler": {"kappa": 300.0, "eta": 0.5}})
    on = off.model_copy(update={"evaluation": off.evaluation.model_copy(update={"controls": True})})
    assert control_points(off) == ()
    assert [point.name for point in control_points(on)] == [
        "kappa-300_eta-0.5_control-shuffled", "control-nearest", "kappa-300_eta-0.5_control-ceiling",
    ]  # fmt: skip


def test_points_without_guidance_share_their_pictures() -> None:
    points = (Point(0.0, 0.5), Point(300.0, 0.0), Point(300.0, 0.5), Point(0.0, 1.0))
    assert [point.name for point in points] == ["unguided", "unguided", "kappa-300_eta-0.5", "unguided"]
    assert [point.name for point in distinct_points(points)] == ["kappa-300_eta-0.5", "unguided"]


def test_the_points_of_a_recipe() -> None:
    config = Config.model_validate(
        {"sampler": {"kappa": 300.0, "eta": 0.5}, "sweep": {"kappa": [1.0], "eta": [0.2, 1]}}
    )
    assert config_points(config) == (Point(0.0, 0.0), Point(300.0, 0.5))
    assert grid_points(config) == (Point(0.0, 0.0), Point(1.0, 0.2), Point(1.0, 1.0))
    without = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"baseline": False})})
    assert config_points(without) == (Point(300.0, 0.5),)


def test_points_that_are_listed_stand_in_the_place_of_the_recipes_own() -> None:
    layers = (0.0, 1.2, 1.0, 1.0, 1.0, 1.0)
    listed = (
        {},
        {"sampler.kappa": 0},
        {"sampler.eta": 0.0, "sampler.cfg_scale": 7.5},
        {"control": "nearest"},
        {"sampler.layer_scale": layers, "evaluation.embeddings": "ground_truth"},
    )
    config = Config().replaced({"evaluation.points": listed, "evaluation.baseline": True})
    settings = (("evaluation.embeddings", "ground_truth"), ("sampler.layer_scale", layers))
    points = (Point(3e5, 0.2), Point(0.0, 0.0), Point(0.0, 0.0, control="nearest"), Point(3e5, 0.2, settings))
    assert config_points(config) == points, "the third is the second: no guidance, and the recipe's own scale"
    assert Point.of(json.loads(json.dumps(points[-1].describe()))) == points[-1]
    assert len({point.name for point in points}) == 4
    check_axes(config)
    for wrong in ({"training.steps": 1}, {"control": "farthest"}, {"sampler.strength": 2.0}):
        with pytest.raises(ConfigError):
            check_axes(Config().replaced({"evaluation.points": ({}, wrong)}))


def test_names_are_those_of_nsd() -> None:
    assert (subject_name(1), image_name(12)) == ("subj01", "image-00012")


def report(split: str = "train", **metrics: dict[tuple[float, float], list[float]]) -> dict[str, Any]:
    entries: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, points in metrics.items():
        for (kappa, eta), values in points.items():
            for subject, value in enumerate(values):
                ends = {"ci_low": value - 0.15, "ci_high": value + 0.15}
                item = {"value": value, "higher_is_better": name != "swav", **ends}
                entries.setdefault((kappa, eta, subject), {})[name] = item
    points_list = [{"kappa": k, "eta": e, "subject": s, "metrics": m} for (k, e, s), m in entries.items()]
    return {"split": split, "points": points_list}


def test_the_best_mean_over_subjects_is_chosen_in_the_metrics_own_direction() -> None:
    grid = {(1.0, 0.5): [0.9, 0.1], (2.0, 0.5): [0.6, 0.6], (3.0, 0.5): [0.1, 0.2]}
    choice = select(report(pixcorr=grid))
    assert (choice.chosen.point, choice.chosen.value) == (Point(2.0, 0.5), pytest.approx(0.6))
    assert [item.point.kappa for item in choice.ranked] == [2.0, 1.0, 3.0]
    assert select(report(swav=grid), "swav").chosen.point == Point(3.0, 0.5)


def test_the_least_guided_point_within_the_best_ones_interval_is_chosen_by_that_rule() -> None:
    grid = {(1.0, 0.5): [0.2], (2.0, 0.2): [0.5], (2.0, 0.5): [0.55], (3.0, 0.5): [0.6]}
    assert select(report(pixcorr=grid), rule="least_guidance").chosen.point == Point(2.0, 0.2)
    assert select(report(pixcorr=grid)).chosen.point == Point(3.0, 0.5)


def test_seeds_are_averaged_over_and_other_settings_are_chosen_from() -> None:
    found = report(pixcorr={(1.0, 0.5): [0.5, 0.7], (2.0, 0.5): [0.4, 0.4]})
    for seed, entry in enumerate(found["points"]):
        entry["settings"] = {"seed": seed % 2, "sampler.cfg_scale": 3.0}
    choice = select(found)
    assert choice.chosen.point == Point(1.0, 0.5, (("sampler.cfg_scale", 3.0),))
    assert choice.chosen.value == pytest.approx(0.6)
    assert Point.of(choice.describe()["chosen"]) == choice.chosen.point


def test_of_equal_points_the_one_with_less_guidance_wins() -> None:
    assert select(report(pixcorr={(2.0, 0.1): [0.5], (1.0, 0.9): [0.5]})).chosen.point == Point(1.0, 0.9)


def test_a_point_is_not_chosen_on_test_images() -> None:
    with pytest.raises(DataError, match="must not be chosen"):
        select(report("test", pixcorr={(1.0, 0.5): [0.5]}))


def test_a_rule_that_does_not_fit_the_report_is_refused() -> None:
    with pytest.raises(ConfigError, match="ssim"):
        select(report(pixcorr={(1.0, 0.5): [0.5]}), "ssim")
    with pytest.raises(ConfigError, match="different guidance points"):
        select(report(pixcorr={(1.0, 0.5): [0.5, 0.6], (2.0, 0.5): [0.7]}))
