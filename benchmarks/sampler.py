"""The guided sampler against the published procedure's work, in the same process and with the same weights.

    python -m benchmarks.sampler                                  two widths on this machine's CPU
    python -m benchmarks.sampler --device cuda --size sd14        full size on a GPU: batches 1, 5 and 20, with and
                                                                  without torch.compile, share of the floor, memory

On the CPU both run the same samples in turn, round after round; the table has medians. ``of promise`` is the measured
ratio of times over the ratio of floating-point operations. Pictures of both are compared in every run; the largest
difference of any sample is printed, and how many samples exceed 1e-4. In float32 a few can: the method has two
thresholds, the attention mask of SAG (> 1) and the clamp of the guidance's pixels, and a value within rounding of one
falls on either side. The same samples agree in float64.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.support.flops import PassCosts, pass_costs
from benchmarks.support.networks import WIDTHS, make_networks
from benchmarks.support.samples import (
    Networks,
    Samples,
    Timing,
    Variant,
    make_samples,
    published_variant,
    sampler_variant,
    timed,
)
from benchmarks.support.throughput import Settings, measure_throughput
from nd_dist.config import SamplerConfig

SAME_PICTURE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
GPU_BATCHES = [1, 5, 20]
COMPILED = {"off": (False,), "on": (True,), "both": (False, True)}


def variants(networks: Networks, config: SamplerConfig, empty: torch.Tensor, approximations: bool) -> list[Variant]:
    """Return the baseline and the settings of the guided sampler that are compared with it."""
    switches: dict[str, dict[str, object]] = {
        "approximation: no UNet gradient": {"unet_gradient": False},
        "approximation: half guidance decode": {"guidance_decode": "half"},
    }
    others = {label: config.model_copy(update=switch) for label, switch in switches.items()} if approximations else {}
    settings = {"guided sampler": config, **others}
    return [
        published_variant(networks, config, empty),
        *(sampler_variant(label, networks, setting, empty) for label, setting in settings.items()),
    ]


def compare(compared: list[Variant], samples: Samples, costs: PassCosts, arguments: argparse.Namespace) -> None:
    """Run all variants in turn, round after round, and print two lines each."""
    timings: list[list[Timing]] = [[] for _ in compared]
    pictures: list[torch.Tensor] = []
    for _ in range(arguments.rounds):
        pictures = []
        for variant, kept in zip(compared, timings, strict=True):
            made, timing = timed(lambda variant=variant: variant.run(samples), arguments.device)  # type: ignore[misc]
            kept.append(timing)
            pictures.append(made)
    flops = [variant.flops(costs) for variant in compared]
    scale = float(pictures[0].abs().max())
    for index, variant in enumerate(compared):
        difference = (pictures[index] - pictures[0]).abs() / scale
        errors = difference.flatten(1).amax(dim=1)
        above = int((errors >= SAME_PICTURE).sum())
        speed = _speed(timings[0], timings[index], flops[0] / flops[index], len(samples.requests))
        print(f"  {variant.label:37s}{speed}")
        print(
            f"{'':39s}{flops[index] / 1e9:.1f} GFLOP per image, relative difference {errors.max():.1e}"
            f" (median {errors.median():.1e}, mean pixel {difference.mean():.1e},"
            f" {above} of {len(errors)} samples above {SAME_PICTURE:.0e})",
            flush=True,
        )


def _speed(baseline: list[Timing], own: list[Timing], promise: float, num: int) -> str:
    """Return a line's figures: rate, ratio to the baseline on both clocks, and their share of the promise."""
    wall = statistics.median(timing.wall_s for timing in own)
    pairs = list(zip(baseline, own, strict=True))
    on_clock = statistics.median(base.wall_s / timing.wall_s for base, timing in pairs)
    on_cpu = statistics.median(base.cpu_s / timing.cpu_s for base, timing in pairs)
    return (
        f"{num / wall:9.3f} images/s, x{on_clock:5.2f} (cpu time x{on_cpu:5.2f}), promised x{promise:4.2f}:"
        f" {on_clock / promise:4.0%} (cpu time {on_cpu / promise:4.0%})"
    )


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Time one width, with and without self-attention guidance."""
    width = WIDTHS[name]
    networks = make_networks(width, arguments.device, DTYPES[arguments.dtype])
    if arguments.channels_last:
        networks[0].unet.to(memory_format=torch.channels_last)
        networks[0].vae.to(memory_format=torch.channels_last)
    samples, empty = make_samples(networks, width.text, arguments.images, arguments.repeats)
    for sag_scale in arguments.sag:
        config = _config(arguments).model_copy(update={"sag_scale": sag_scale})
        print(f"size {name}, SAG {sag_scale}, {vars(arguments)}")
        compared = variants(networks, config, empty, arguments.approximations)
        compare(compared, samples, pass_costs(width), arguments)


def _config(arguments: argparse.Namespace) -> SamplerConfig:
    return SamplerConfig(
        kappa=arguments.kappa, eta=arguments.eta, num_steps=arguments.steps, max_rows=arguments.max_rows
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=sorted(WIDTHS), default=["toy", "wide"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="samples per call: the throughput table (a GPU's default)"
    )
    parser.add_argument("--compile", choices=sorted(COMPILED), default="both", help="in the throughput table")
    parser.add_argument("--matmul-side", type=int, help="of the product that gives the floor; 2048, on a GPU 8192")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every variant; the table has medians")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the full schedule; 3/4 of them are run")
    parser.add_argument("--kappa", type=float, default=3000.0)
    parser.add_argument("--eta", type=float, default=0.2)
    parser.add_argument("--sag", type=float, nargs="+", default=[0.75])
    parser.add_argument("--max-rows", type=int, help="most samples in one pass of a network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--approximations", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args(words)
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    arguments.batch = arguments.batch or (GPU_BATCHES if on_gpu else None)
    arguments.matmul_side = arguments.matmul_side or (8192 if on_gpu else 2048)
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    for name in arguments.size:
        if arguments.batch is None:
            measure(name, arguments)
            continue
        for sag_scale in arguments.sag:
            measure_throughput(
                Settings(
                    size=name,
                    device=arguments.device,
                    dtype=DTYPES[arguments.dtype],
                    batches=tuple(arguments.batch),
                    compiled=COMPILED[arguments.compile],
                    rounds=arguments.rounds,
                    matmul_side=arguments.matmul_side,
                    config=_config(arguments).model_copy(update={"sag_scale": sag_scale}),
                )
            )


if __name__ == "__main__":
    main()
