"""Made-up (image, repeat) units for timing, and the ways to make their pictures that are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.support.flops import PassCosts
from benchmarks.support.published import PublishedSampler
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest, draw_noise
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion

Networks = tuple[StableDiffusion, ClipVision]


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
    networks: Networks, text: tuple[int, int], num_images: int, num_repeats: int
) -> tuple[Samples, torch.Tensor]:
    """Return samples whose guidance targets are features of made-up pictures, and an empty caption."""
    sd, clip = networks
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
    flops: Callable[[PassCosts], int]


def published_variant(
    networks: Networks, config: SamplerConfig, empty: torch.Tensor, autocast: torch.dtype | None = None
) -> Variant:
    """Return the baseline: one sample at a time; ``autocast`` runs the networks in a lower precision, as released."""
    sd, clip = networks
    published = PublishedSampler(sd, ClipGuidance(clip, config.layer_scale), config, empty)

    def run(samples: Samples) -> torch.Tensor:
        rows = (samples.row(row) for row in range(len(samples.requests)))
        with torch.autocast(sd.device.type, dtype=autocast, enabled=autocast is not None):
            return torch.cat([published.sample(row.c, row.z, row.noise, row.targets) for row in rows])

    return Variant("published procedure", run, lambda costs: costs.published(config))


def sampler_variant(label: str, networks: Networks, config: SamplerConfig, empty: torch.Tensor) -> Variant:
    """Return a setting of the guided sampler."""
    sd, clip = networks
    sampler = GuidedSampler(sd, ClipGuidance(clip, config.layer_scale), config, empty)

    def run(samples: Samples) -> torch.Tensor:
        options = SampleOptions(noise_BCHW=samples.noise)
        return sampler.sample(samples.c, samples.z, samples.targets, samples.requests, options=options).images_BCHW

    return Variant(label, run, lambda costs: costs.sampler(config))


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the clock, and of this process's processors (steadier on a busy machine)."""

    wall_s: float
    cpu_s: float


def timed(run: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, Timing]:
    """Return the result and how long it took."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    synchronize(device)
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype, side: int, rounds: int = 5) -> float:
    """Return the measured floating-point operations per second of a product of two ``side`` x ``side`` matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device)[1].wall_s for _ in range(rounds + 1)][1:]
    return 2.0 * side**3 / statistics.median(times)
