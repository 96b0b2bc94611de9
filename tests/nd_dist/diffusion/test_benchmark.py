from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import sampler as benchmark
from benchmarks.support.flops import PassCosts, count_flops, pass_costs
from benchmarks.support.networks import WIDTHS
from nd_dist.config import SamplerConfig

SHORT = ["--size", "toy", "--steps", "8", "--eta", "0.4", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_benchmark_compares_equal_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", "1", "--repeats", "2", "--sag", "0.75", "0.0", "--max-rows", "2", "--channels-last"]
    double = ["--dtype", "float64"]  # in float32 a value at a threshold may fall on either side
    benchmark.main([*SHORT, *options, *double, "--no-approximations"])
    printed = capsys.readouterr().out
    differences = [float(value) for value in re.findall(r"relative difference (\S+)", printed)]
    baseline, ours = differences[::2], differences[1::2]
    assert baseline == [0.0, 0.0]
    assert len(ours) == 2
    assert all(difference < 1e-4 for difference in ours)
    promises = [float(value) for value in re.findall(r"promised x\s*([\d.]+)", printed)]
    assert all(1.5 < promise < 2.6 for promise in promises[1::2])


@pytest.mark.launch
def test_the_throughput_table_has_a_line_for_every_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1", "2", "--compile", "off", "--dtype", "bfloat16", "--matmul-side", "16"]
    benchmark.main([*SHORT, *options])
    printed = capsys.readouterr().out
    lines = re.findall(r"batch (\d+) +[\d.]+ images/s, x *[\d.]+, *[\d.]+% of the floor", printed)
    assert lines == ["1", "2"]
    (correlation,) = re.findall(r"bfloat16 against float32 on 2 pictures: PixCorr ([\d.]+)", printed)
    assert 0.5 < float(correlation) <= 1.0


@pytest.fixture(scope="module")
def full_size() -> PassCosts:
    return pass_costs(WIDTHS["sd14"])


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("unet", 0.803),
        ("unet_gradient", 1.726),
        ("decode", 2.515),
        ("decode_gradient", 5.063),
        ("half_decode_gradient", 1.25),
        ("encode", 1.117),
        ("clip", 0.0045),
        ("clip_gradient", 0.0091),
    ],
)
def test_full_size_networks_cost_what_stable_diffusion_1_4_costs(full_size: PassCosts, name: str, tera: float) -> None:
    assert getattr(full_size, name) / 1e12 == pytest.approx(tera, rel=0.02)


def test_a_picture_at_full_size_costs_1_74_times_less_than_as_published(full_size: PassCosts) -> None:
    config = SamplerConfig()
    assert full_size.published(config) / 1e12 == pytest.approx(232.4, rel=0.01)
    assert full_size.sampler(config) / 1e12 == pytest.approx(133.6, rel=0.01)
    without = config.model_copy(update={"sag_scale": 0.0})
    assert full_size.sampler(without) / 1e12 == pytest.approx(103.9, rel=0.01)
    half = without.model_copy(update={"guidance_decode": "half"})
    assert full_size.sampler(half) / 1e12 == pytest.approx(77.2, rel=0.01)


def test_the_counted_cost_of_a_picture_is_what_the_sampler_does() -> None:
    costs, config = pass_costs(WIDTHS["toy"]), SamplerConfig(num_steps=8, eta=0.4, kappa=3000.0)
    networks = benchmark.make_networks(WIDTHS["toy"], "cpu", torch.float32)
    samples, empty = benchmark.make_samples(networks, WIDTHS["toy"].text, 1, 1)
    for variant in benchmark.variants(networks, config, empty, approximations=True):
        with sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's fused attention
            counted = count_flops(lambda run=variant.run: run(samples))  # type: ignore[misc]
        assert counted == pytest.approx(variant.flops(costs), rel=0.02), variant.label
