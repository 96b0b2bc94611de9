"""The guided sampler against the published procedure's work, in the same process and with the same weights.

    python -m benchmarks.sampler                                 two widths on this machine's CPU
    python -m benchmarks.sampler --width sd14 --device cuda --dtype bfloat16 --images 4 --repeats 5

Both run the same samples in turn, round after round; the table has medians. ``of promise`` is the measured ratio of
times over the ratio of floating-point operations. Pictures of both are compared in every run; the largest difference
of any sample is printed, and how many samples exceed 1e-4. In float32 a few can: the method has two thresholds, the
attention mask of SAG (> 1) and the clamp of the guidance's pixels, and a value within rounding of one falls on either
side. The same samples agree in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks._networks import WIDTHS, make_networks
from benchmarks._published import PublishedSampler
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest, draw_noise
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions, SamplerLimits
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion

SAME_PICTURE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Samples:
    """Made-up targets of some (image, repeat) units, one row each."""

    c: torch.Tensor
    z: torch.Tensor
    noise: torch.Tensor
    targets: dict[str, torch.Tensor]
    requests: list[NoiseRequest]

    def row(self, row: int) -> Samples:
        """Return one sample."""
        one = slice(row, row + 1)
        targets = {name: values[one] for name, values in self.targets.items()}
        return Samples(self.c[one], self.z[one], self.noise[one], targets, self.requests[one])


def make_samples(
    sd: StableDiffusion, clip: ClipVision, text: tuple[int, int], num_images: int, num_repeats: int
) -> tuple[Samples, torch.Tensor]:
    """Return samples whose guidance targets are features of made-up pictures, and an empty caption."""
    generator = torch.Generator().manual_seed(1)
    requests = [NoiseRequest(image, repeat, 0) for image in range(num_images) for repeat in range(num_repeats)]
    pixels = torch.rand(num_images, 3, clip.image_size, clip.image_size, generator=generator)
    with torch.no_grad():
        features = clip.features(pixels)
    c = torch.randn(num_images, *text, generator=generator)
    z = torch.randn(num_images, *sd.latent_shape, generator=generator)
    empty = torch.randn(1, *text, generator=generator)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.float().to(sd.device).repeat_interleave(num_repeats, dim=0)

    targets = {name: rows(feature) for name, feature in zip(clip.layer_names, features, strict=True)}
    noise = draw_noise(requests, sd.latent_shape).to(sd.device)
    return Samples(rows(c), rows(z), noise, targets, requests), empty.to(sd.device)


@dataclass(frozen=True)
class Variant:
    """One way to make the pictures of some samples."""

    label: str
    run: Callable[[Samples], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the clock, and of this process's processors (steadier on a busy machine)."""

    wall_s: float
    cpu_s: float


def published_variant(
    sd: StableDiffusion, guidance: ClipGuidance, config: SamplerConfig, empty: torch.Tensor
) -> Variant:
    """Return the baseline."""
    published = PublishedSampler(sd, guidance, config, empty)

    def run(samples: Samples) -> torch.Tensor:
        rows = (samples.row(row) for row in range(len(samples.requests)))
        return torch.cat([published.sample(row.c, row.z, row.noise, row.targets) for row in rows])

    return Variant("published procedure", run)


def sampler_variant(label: str, sampler: GuidedSampler) -> Variant:
    """Return a setting of the guided sampler."""

    def run(samples: Samples) -> torch.Tensor:
        options = SampleOptions(noise_BCHW=samples.noise)
        return sampler.sample(samples.c, samples.z, samples.targets, samples.requests, options=options).images_BCHW

    return Variant(label, run)


def timed(run: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, Timing]:
    """Return the result and how long it took."""
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)


class _FlopCount(TorchDispatchMode):
    """Adds up torch's own operation counts; unlike FlopCounterMode it also sees gradients of leaf tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its count."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


def count_flops(run: Callable[[], torch.Tensor]) -> int:
    """Return the floating-point operations of a call (2 per multiply-add)."""
    with _FlopCount() as counter:
        run()
    return counter.total


def variants(
    sd: StableDiffusion, clip: ClipVision, config: SamplerConfig, empty: torch.Tensor, arguments: argparse.Namespace
) -> list[Variant]:
    """Return the baseline and the settings of the guided sampler that are compared with it."""
    guidance = ClipGuidance(clip, config.layer_scale)
    limits = SamplerLimits(unet_rows=arguments.rows, vae_rows=arguments.vae_rows)
    approximation = config.model_copy(update={"unet_gradient": False})
    return [
        published_variant(sd, guidance, config, empty),
        sampler_variant("guided sampler", GuidedSampler(sd, guidance, config, limits, empty)),
        sampler_variant("approximation: no UNet gradient", GuidedSampler(sd, guidance, approximation, limits, empty)),
    ]


def compare(compared: list[Variant], samples: Samples, arguments: argparse.Namespace) -> None:
    """Run all variants in turn, round after round, and print a line each."""
    flops = [count_flops(lambda variant=variant: variant.run(samples.row(0))) for variant in compared]  # type: ignore[misc]
    timings: list[list[Timing]] = [[] for _ in compared]
    pictures: list[torch.Tensor] = []
    for _ in range(arguments.rounds):
        pictures = []
        for variant, kept in zip(compared, timings, strict=True):
            made, timing = timed(lambda variant=variant: variant.run(samples), arguments.device)  # type: ignore[misc]
            kept.append(timing)
            pictures.append(made)
    scale = float(pictures[0].abs().max())
    for index, variant in enumerate(compared):
        errors = (pictures[index] - pictures[0]).abs().flatten(1).amax(dim=1) / scale
        above = int((errors >= SAME_PICTURE).sum())
        speed = _speed(timings[0], timings[index], flops[0] / flops[index], len(samples.requests))
        print(f"  {variant.label:33s}{speed}")
        print(
            f"{'':35s}{flops[index] / 1e9:.1f} GFLOP per image, relative difference {errors.max():.1e}"
            f" (median {errors.median():.1e}, {above} of {len(errors)} samples above {SAME_PICTURE:.0e})",
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
    sd, clip = make_networks(width, arguments.device, DTYPES[arguments.dtype])
    if arguments.channels_last:
        sd.unet.to(memory_format=torch.channels_last)
        sd.vae.to(memory_format=torch.channels_last)
    if arguments.compile:
        sd.unet.compile()
    samples, empty = make_samples(sd, clip, width.text, arguments.images, arguments.repeats)
    for sag_scale in arguments.sag:
        config = SamplerConfig(
            kappa=arguments.kappa, eta=arguments.eta, num_steps=arguments.steps, sag_scale=sag_scale
        )
        print(f"width {name}, SAG {sag_scale}, {vars(arguments)}")
        compare(variants(sd, clip, config, empty, arguments), samples, arguments)
        if arguments.device != "cpu":
            print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", choices=sorted(WIDTHS), default=["toy", "wide"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="runs of every variant; the table has medians")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the full schedule; 3/4 of them are run")
    parser.add_argument("--kappa", type=float, default=3000.0)
    parser.add_argument("--eta", type=float, default=0.2)
    parser.add_argument("--sag", type=float, nargs="+", default=[0.75])
    parser.add_argument("--rows", type=int, help="most samples in one UNet pass")
    parser.add_argument("--vae-rows", type=int, help="most samples in one gradient of the VAE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    for name in arguments.width:
        measure(name, arguments)


if __name__ == "__main__":
    main()
