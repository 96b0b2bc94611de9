"""Pictures per second by batch size, with and without torch.compile, against what the matrix products alone need.

Runs unattended: a batch that does not fit is a line that says so. The baseline is the published procedure, one sample
at a time, on a GPU under float16 autocast as released.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.support.flops import PassCosts, pass_costs
from benchmarks.support.networks import WIDTHS, make_networks, other_dtype
from benchmarks.support.samples import (
    Networks,
    Samples,
    Variant,
    make_samples,
    matmul_rate,
    published_variant,
    sampler_variant,
    synchronize,
    timed,
)
from nd_dist.compute.chunks import OutOfMemory
from nd_dist.config import SamplerConfig
from nd_dist.metrics.pixel import pixel_correlation, structural_similarity


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        size: Name of the networks' width.
        device: ``cpu`` or ``cuda``.
        dtype: Of the guided sampler's networks.
        batches: Samples per call.
        compiled: Which of "plain" (False) and "compiled" (True) to run.
        rounds: Timed calls of each; the table has medians.
        matmul_side: Side of the matrices whose product gives the floor: large, or the floor is too low.
        config: Scales.
    """

    size: str
    device: str
    dtype: torch.dtype
    batches: tuple[int, ...]
    compiled: tuple[bool, ...]
    rounds: int
    matmul_side: int
    config: SamplerConfig


def measure_throughput(settings: Settings) -> None:
    """Print the baseline, a line per batch size and compilation, and how half precision changes the pictures."""
    width, device = WIDTHS[settings.size], settings.device
    wide = make_networks(width, device, torch.float32)
    own = other_dtype(wide, settings.dtype)
    if device != "cpu":
        for networks in (wide, own):
            for network in (networks[0].unet, networks[0].vae):
                network.to(memory_format=torch.channels_last)
    costs, rate = pass_costs(width), matmul_rate(device, settings.dtype, settings.matmul_side)
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    print(f"{settings.size} on {name}, torch {torch.__version__}, {settings.dtype}: {settings.config}")
    print(f"  matrix products {rate / 1e12:.2f} TFLOP/s; a picture needs {costs.sampler(settings.config) / 1e12:.4g}")
    baseline = _baseline(wide, settings)
    for batch in settings.batches:
        samples, empty = make_samples(own, width.text, batch, 1)
        for compiled in settings.compiled:
            config = settings.config.model_copy(update={"compile": compiled})
            variant = sampler_variant(f"batch {batch}{', compiled' if compiled else ''}", own, config, empty)
            _measure_variant(variant, samples, settings, baseline, (costs, rate))
    _compare_precisions(wide, own, settings)


def _baseline(networks: Networks, settings: Settings) -> float:
    """Print and return the baseline's pictures per second."""
    samples, empty = make_samples(networks, WIDTHS[settings.size].text, 1, 1)
    autocast = torch.float16 if settings.device != "cpu" else None
    variant = published_variant(networks, settings.config, empty, autocast)
    seconds, peak = _seconds(variant, samples, settings)
    print(f"  {variant.label:24s}{1 / seconds:9.4f} images/s{peak}", flush=True)
    return 1 / seconds


def _measure_variant(
    variant: Variant, samples: Samples, settings: Settings, baseline: float, floor: tuple[PassCosts, float]
) -> None:
    costs, rate = floor
    try:
        seconds, peak = _seconds(variant, samples, settings)
    except (OutOfMemory, torch.cuda.OutOfMemoryError) as error:
        print(f"  {variant.label:24s} does not fit: {str(error).splitlines()[0]}", flush=True)
        return
    speed = len(samples.requests) / seconds
    share = speed * costs.sampler(settings.config) / rate
    print(
        f"  {variant.label:24s}{speed:9.4f} images/s, x{speed / baseline:5.2f}, {share:5.1%} of the floor{peak}",
        flush=True,
    )


def _seconds(variant: Variant, samples: Samples, settings: Settings) -> tuple[float, str]:
    """Return the median seconds of a call after one that warms up, and its peak memory as text."""
    variant.run(samples)
    synchronize(settings.device)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(lambda: variant.run(samples), settings.device)[1].wall_s for _ in range(settings.rounds)]
    peak = "" if settings.device == "cpu" else f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return statistics.median(times), peak


def _compare_precisions(wide: Networks, own: Networks, settings: Settings) -> None:
    """Print PixCorr and SSIM between pictures in the sampler's dtype and in float32 (random weights)."""
    samples, empty = make_samples(wide, WIDTHS[settings.size].text, min(4, max(settings.batches)), 1)
    full, half = (sampler_variant("", networks, settings.config, empty).run(samples) for networks in (wide, own))
    correlation = pixel_correlation(half, full)
    similarity = structural_similarity(half, full)
    print(
        f"  {settings.dtype} against float32 on {len(full)} pictures: PixCorr {correlation.mean():.5f}"
        f" (lowest {correlation.min():.5f}), SSIM {similarity.mean():.5f}",
        flush=True,
    )
