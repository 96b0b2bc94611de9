"""Start noise that depends on the unit of work only: one seed per (image, repeat), or the released draws.

Drawn in float32 by the CPU's generator, so that every device and every batch gets the same values; or by a GPU's,
whose stream is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from nd_dist.errors import ConfigError
from nd_dist.seeds import unit_seed

OFFICIAL_SEED = 42
OFFICIAL_DRAWS_PER_REPEAT = 41
CPU = torch.device("cpu")

LatentShape = tuple[int, int, int]


@dataclass(frozen=True)
class NoiseRequest:
    """One reconstruction to make: the unit that names it in seeds and errors.

    Args:
        image_id: 0-based image id.
        repeat: Which of the image's reconstructions, 0-based.
        run_seed: Seed of the run.
    """

    image_id: int
    repeat: int
    run_seed: int


def draw_noise(
    requests: Sequence[NoiseRequest],
    shape: LatentShape,
    kind: Literal["per_image", "official"] = "per_image",
    device: torch.device = CPU,
) -> torch.Tensor:
    """Return standard normal noise, float32 (B, C, H, W), one row per request.

    Args:
        requests: Which reconstructions.
        shape: Shape (C, H, W) of one latent.
        kind: ``per_image``: a seed per (image, repeat). ``official``: as released, every image's repeat r gets draw
            41 r of a generator seeded with 42 (one draw and 40 discarded per repeat), so all images share the noises.
        device: Whose generator draws; the noise lies there.

    Raises:
        ConfigError: a GPU's noise is asked for where there is none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "The noise is to be drawn on a GPU, and torch sees none.",
            where="sampler.noise_device",
            expected="cpu on this machine",
            found=str(device),
            todo="use sampler.noise_device=cpu (a different noise, the same on every machine)",
        )
    if kind == "official":
        return torch.stack([_official_draw(request.repeat, shape, device) for request in requests])
    return torch.stack([_own_draw(request, shape, device) for request in requests])


def _own_draw(request: NoiseRequest, shape: LatentShape, device: torch.device) -> torch.Tensor:
    seed = unit_seed(request.run_seed, "noise", request.image_id, request.repeat)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@lru_cache(maxsize=64)
def _official_draw(repeat: int, shape: LatentShape, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(OFFICIAL_SEED)
    for _ in range(OFFICIAL_DRAWS_PER_REPEAT * repeat):
        torch.randn((1, *shape), generator=generator, device=device)
    return torch.randn((1, *shape), generator=generator, device=device)[0]
