"""Reconstruct images: targets -> guided sampler -> PNG files and a record per image.

One forward batch is one image with all its repeats (they share c, z and g), never several images: so the bits of a
reconstruction depend on neither batch size nor who made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nd_dist.config import Config
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.pictures import to_uint8
from nd_dist.evaluation.decode import ImageTargets
from nd_dist.evaluation.layout import PICTURE, repeat_file
from nd_dist.evaluation.networks import Sampler
from nd_dist.evaluation.records import publish, write_png
from nd_dist.evaluation.source import Source
from nd_dist.evaluation.units import Point
from nd_dist.files import sha256_file
from nd_dist.schema import GUIDANCE, INITIAL, SEMANTIC
from nd_dist.seeds import unit_seed


def guidance_names(config: Config) -> tuple[str, ...]:
    """Return the guidance targets that the sampler uses, one per factor of ``sampler.layer_scale``."""
    return GUIDANCE[: len(config.sampler.layer_scale)]


def reconstruct_image(
    folder: Path, fingerprint: str, config: Config, sampler: Sampler, targets: ImageTargets, what: tuple[Point, int]
) -> bool:
    """Make all repeats of one image at one point and publish them; False where another rank was first.

    Args:
        folder: The image's result folder.
        fingerprint: Of everything that determines the pictures.
        config: The recipe: seed, number of repeats, rounding.
        sampler: The guided sampler.
        targets: Decoded (or true) targets.
        what: Guidance point and image id.
    """
    point, image_id = what
    num_repeats = config.evaluation.num_repeats
    requests = [NoiseRequest(image_id, repeat, config.seed) for repeat in range(num_repeats)]
    guidance = guidance_names(config) if point.is_guided else ()
    rows = {name: _repeated(targets, name, image_id, num_repeats) for name in (SEMANTIC, INITIAL, *guidance)}
    result = sampler.sample(
        rows[SEMANTIC],
        rows[INITIAL],
        {name: rows[name] for name in guidance},
        requests,
        point.kappa if point.is_guided else 0.0,
        point.eta if point.is_guided else 0.0,
    )
    pictures_RHWC = to_uint8(result.images_BCHW, config.sampler.uint8)
    files = [repeat_file(repeat) for repeat in range(num_repeats)]
    facts = {"image_id": image_id, "files": {}, "noise_seeds": _noise_seeds(config, requests)}

    def write(staging: Path) -> None:
        for name, picture_HWC in zip(files, pictures_RHWC, strict=True):
            write_png(staging / name, picture_HWC)
            facts["files"][name] = sha256_file(staging / name)  # type: ignore[index]

    return publish(folder, fingerprint, facts, write)


def store_original(folder: Path, fingerprint: str, source: Source, image_id: int) -> bool:
    """Publish the picture that was seen; False where another rank was first."""
    picture_HWC = source.pictures([image_id])[0]
    facts = {"image_id": image_id}
    return publish(folder, fingerprint, facts, lambda staging: write_png(staging / PICTURE, picture_HWC))


def _repeated(targets: ImageTargets, name: str, image_id: int, num_repeats: int) -> torch.Tensor:
    """Return one image's target once per repeat."""
    row = np.ascontiguousarray(targets.rows(name, [image_id])[0])
    return torch.from_numpy(row)[None].repeat(num_repeats, *[1] * row.ndim)


def _noise_seeds(config: Config, requests: Sequence[NoiseRequest]) -> list[int]:
    """Return the noise seed of each repeat for the record (``noise=official`` has fixed draws instead)."""
    if config.sampler.noise == "official":
        return []
    return [unit_seed(request.run_seed, "noise", request.image_id, request.repeat) for request in requests]
