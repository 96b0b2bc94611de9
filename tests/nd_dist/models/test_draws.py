from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nd_dist import seeds
from nd_dist.models.draws import Draws, dropout, host_bits, host_doubles, splitmix64


def test_the_torch_hash_equals_the_numpy_hash() -> None:
    state = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    expected = seeds.splitmix64(state)
    found = splitmix64(torch.from_numpy(state.view(np.int64))).numpy().view(np.uint64)
    np.testing.assert_array_equal(found, expected)


def test_a_sample_draws_the_same_numbers_in_any_batch_and_order() -> None:
    whole = Draws(3, 11, torch.arange(8))
    for kind in ("uniform", "normal"):
        rows = getattr(whole, kind)("noise", 3, 5)
        part = getattr(Draws(3, 11, torch.tensor([6, 2])), kind)("noise", 3, 5)
        torch.testing.assert_close(part, rows[[6, 2]], rtol=0, atol=0)


def test_seed_step_purpose_and_sample_all_change_the_numbers() -> None:
    base = Draws(3, 11, torch.arange(2)).uniform("noise", 4)
    others = [
        Draws(4, 11, torch.arange(2)).uniform("noise", 4),
        Draws(3, 12, torch.arange(2)).uniform("noise", 4),
        Draws(3, 11, torch.arange(2)).uniform("time", 4),
    ]
    assert all(not torch.equal(base, other) for other in others)
    assert not torch.equal(base[0], base[1])


@pytest.mark.parametrize(("kind", "law"), [("uniform", "uniform"), ("normal", "norm")])
def test_the_numbers_follow_their_distribution_along_samples_and_along_elements(kind: str, law: str) -> None:
    values = getattr(Draws(0, 0, torch.arange(300)), kind)("x", 301).numpy()
    for sample in (values.ravel(), values[:, 7], values[5]):
        assert stats.kstest(sample, law).pvalue > 1e-3
    assert np.abs(np.corrcoef(values[:40])[np.triu_indices(40, 1)]).mean() < 0.1


def test_dropout_zeroes_its_share_and_keeps_the_mean_and_is_off_without_draws() -> None:
    ones = torch.ones(200, 500)
    dropped = dropout(ones, 0.25, Draws(0, 0, torch.arange(200)), "d")
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert dropout(ones, 0.25, None, "d") is ones
    assert float(dropout(ones, 1.0, Draws(0, 0, torch.arange(200)), "d").abs().max()) == 0


def test_a_draw_without_shape_is_one_number_per_sample() -> None:
    assert Draws(0, 0, torch.arange(5)).uniform("t").shape == (5,)
    assert Draws(0, 0, torch.arange(5)).keep("t", 0.5).dtype == torch.bool


def test_the_host_makes_the_same_numbers_of_every_purpose_in_one_call() -> None:
    purposes, ids = ("time", "drop_condition", "drop_target"), np.array([6, 0, 2, 71])
    made = Draws.host_uniforms(3, 11, purposes, ids)
    assert made.dtype == torch.float32
    on_device = Draws(3, 11, torch.from_numpy(ids))
    for purpose, numbers in zip(purposes, made, strict=True):
        assert torch.equal(numbers, on_device.uniform(purpose))
        assert torch.equal(Draws(3, 11, torch.arange(4), {purpose: numbers}).uniform(purpose), numbers)
    shaped = Draws(3, 11, torch.from_numpy(ids), {"time": made[0]}).uniform("time", 2)
    assert torch.equal(shaped, on_device.uniform("time", 2)), "draws of several numbers are made where the data is"


def test_doubles_have_53_bits_and_stay_below_one() -> None:
    bits = host_bits(0, 0, ["x"], np.arange(20_000))
    values = host_doubles(bits)
    assert values.dtype == np.float64
    assert 0 <= values.min() <= values.max() < 1
    assert host_doubles(np.array([2**64 - 1], dtype=np.uint64))[0] == 1 - 2.0**-53
    assert stats.kstest(values[0], "uniform").pvalue > 1e-3
