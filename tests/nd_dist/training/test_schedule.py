from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nd_dist.training.schedule import OneCycle, contrastive_phase, softclip_temperature


@pytest.mark.parametrize("total", [50, 300, 1001])
def test_one_cycle_equals_torchs_schedule_with_its_default_momentum(total: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-4, total_steps=total, pct_start=0.05, final_div_factor=1000
    )
    own = OneCycle(total, 3e-4, 0.05, cycle_momentum=True)
    for step in range(total):
        group = optimizer.param_groups[0]
        assert own.learning_rate(step) == pytest.approx(group["lr"], rel=1e-12)
        assert own.beta1(step) == pytest.approx(group["betas"][0], rel=1e-12)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_the_published_learning_rate_starts_peaks_and_ends_where_it_should() -> None:
    own = OneCycle(107_100, 3e-4, 2 / 150, cycle_momentum=False)
    assert own.learning_rate(0) == pytest.approx(1.2e-5)
    assert own.learning_rate(1427) == pytest.approx(3e-4)
    assert own.learning_rate(107_099) == pytest.approx(1.2e-8)
    assert own.beta1(5) == 0.9


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 200), st.one_of(st.sampled_from([0.01, 0.05, 0.1, 2 / 150, 0.5]), st.floats(1e-6, 1 - 1e-6)))
@example(10, 0.1)
@example(20, 0.05)
@example(75, 2 / 150)
@example(100, 0.01)
def test_a_schedule_of_any_length_is_finite_in_range_and_ends_at_its_lowest_rate(total: int, fraction: float) -> None:
    own = OneCycle(total, 3e-4, fraction, cycle_momentum=True)
    rates = [own.learning_rate(step) for step in range(total)]
    assert all(0 < rate <= 3e-4 for rate in rates)
    assert all(0.85 <= own.beta1(step) <= 0.95 for step in range(total))
    assert rates[-1] == pytest.approx(3e-4 / 25_000)


def test_mixco_comes_first_and_softclip_warms_from_end_to_end() -> None:
    phases = [contrastive_phase(step, 150, 49 / 150) for step in range(150)]
    assert [phase.is_mixco for phase in phases] == [True] * 49 + [False] * 101
    assert phases[0].temperature == 0.006
    assert [phases[49].temperature, phases[149].temperature] == pytest.approx([0.004, 0.0075])
    # with one step per epoch it is the published per-epoch schedule
    for epoch in range(101):
        assert phases[49 + epoch].temperature == pytest.approx(softclip_temperature(epoch / 100))


def test_a_fraction_of_zero_or_one_leaves_one_phase() -> None:
    assert not contrastive_phase(0, 10, 0.0).is_mixco
    assert contrastive_phase(9, 10, 1.0).is_mixco
