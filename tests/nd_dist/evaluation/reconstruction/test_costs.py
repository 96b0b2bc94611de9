"""Estimates: steps of a unit, seconds per step from two measurements, GPU-hours of what is left."""

import pytest

from nd_dist.config import Config
from nd_dist.evaluation.points.units import Bundle, Point
from nd_dist.evaluation.reconstruction.costs import (
    DiskUse,
    StepCost,
    StepCount,
    cost_class,
    duration,
    estimate,
    fit_cost,
    unit_steps,
)

CONFIG = Config.model_validate({"sampler": {"num_steps": 50, "strength": 0.75}})


def test_points_of_one_kappa_share_their_guided_steps() -> None:
    assert unit_steps(CONFIG, [Point(0.0, 0.0)]) == StepCount(0, 37)
    assert unit_steps(CONFIG, [Point(1.0, 0.2)]) == StepCount(7, 30)
    assert unit_steps(CONFIG, [Point(1.0, 0.2), Point(1.0, 1.0)]) == StepCount(37, 30)
    assert unit_steps(CONFIG, [Point(0.0, 0.0, control="nearest")]) == StepCount(0, 0)


def test_two_measurements_give_the_seconds_of_both_kinds_of_steps() -> None:
    true = StepCost(guided_s=0.8, plain_s=0.2)
    works = [StepCount(0, 37), StepCount(37, 30)]
    found = fit_cost([(work, true.seconds(work)) for work in works])
    assert (found.guided_s, found.plain_s) == (pytest.approx(0.8), pytest.approx(0.2))


def test_one_measurement_keeps_the_usual_ratio_and_still_gives_its_own_seconds_back() -> None:
    found = fit_cost([(StepCount(7, 30), 5.0)])
    assert found.seconds(StepCount(7, 30)) == pytest.approx(5.0)
    assert found.guided_s / found.plain_s == pytest.approx(3.5)
    odd = fit_cost([(StepCount(0, 10), 100.0), (StepCount(10, 0), 1.0)])
    assert odd.guided_s > odd.plain_s > 0, "measurements that noise turned round are not believed"


def test_hours_add_up_over_groups_and_are_shared_by_ranks() -> None:
    group = Bundle((Point(1.0, 0.2),), 1, 0, (1, 2, 3))
    found = estimate(
        [(group, 3, StepCount(10, 20)), (group, 1, StepCount(10, 20))], {"unguided": StepCost(60.0, 30.0)}, 4
    )
    assert found.gpu_hours == pytest.approx(4 * (600 + 600) / 3600)
    assert found.wall_hours == pytest.approx(found.gpu_hours / 4)
    assert "4 unit(s)" in found.describe()
    assert "1.33 GPU-hours" in found.describe()


def test_a_paper_sweep_is_told_how_it_fits_the_disk() -> None:
    images, groups = 36 * 4 * 1000, 36 * 4
    whole = DiskUse(images, images, 2 * 7 * 1000, 5, 410e3, 1e6)
    assert (whole.files, round(whole.most_bytes / 1e9)) == (864_000, 394)
    text = whole.describe(groups)
    assert "evaluation.keep_pictures=115" in text
    few = DiskUse(images, 115 * groups, 2 * 7 * 1000, 5, 410e3, 1e6)
    assert few.files <= 100_000
    assert few.most_bytes < 300e9
    assert "keep_pictures" not in few.describe(groups)


def test_seeds_and_controls_cost_what_their_point_costs() -> None:
    point = Point(1.0, 0.2, (("sampler.num_steps", 20), ("seed", 3)), "shuffled")
    assert cost_class(point) == cost_class(Point(0.0, 0.0, (("sampler.num_steps", 20),)))
    assert cost_class(point) != cost_class(Point(0.0, 0.0))


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (12_240, "3.4 h"), (200_000, "2.3 d")])
def test_spans_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
