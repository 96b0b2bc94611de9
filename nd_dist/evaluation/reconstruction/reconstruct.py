"""Reconstruct images: targets -> guided sampler -> PNG files and a record per image.

A forward batch has a fixed number of places, each for one image with all its repeats: so the bits of a reconstruction
depend neither on its neighbours nor on who made it. Points of one kappa share their guided steps.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.config import Config, SamplerConfig
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.pictures import grey_rows, write_steps
from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.diffusion.samples import SampleOptions, SampleResult, StepRecord, joined
from nd_dist.diffusion.schedule import StepPlan
from nd_dist.evaluation.points.layout import PICTURE, repeat_file
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.fanout.results import publish, read_record, write_png
from nd_dist.files import sha256_file
from nd_dist.pixels import to_uint8
from nd_dist.schema import INITIAL, SEMANTIC
from nd_dist.seeds import unit_seed


@dataclass(frozen=True)
class Result:
    """Where a point's reconstructions of one image go.

    Args:
        point: Guidance point.
        folder: The image's result folder.
        fingerprint: Of everything that determines the pictures.
        first: The first repeat to make; those before it are there.
    """

    point: Point
    folder: Path
    fingerprint: str
    first: int = 0


@dataclass(frozen=True)
class Reconstruction:
    """The missing repeats of one image at a point, made and not yet written.

    Args:
        result: Where they go.
        images_RCHW: Pictures in [0,1].
        steps_TRCHW: Pictures after every step, where the recipe asks for them.
        failed: Repeats that are shown grey.
        facts: What the record says of them.
    """

    result: Result
    images_RCHW: torch.Tensor
    steps_TRCHW: torch.Tensor
    failed: tuple[int, ...]
    facts: Mapping[str, Any]

    def publish(self, config: SamplerConfig) -> bool:
        """Write the pictures as the recipe rounds and shows them; of two ranks the first counts."""
        pictures_RHWC = to_uint8(grey_rows(self.images_RCHW, self.failed), config.uint8)
        shown_TRCHW, kind = grey_rows(self.steps_TRCHW, self.failed, dim=1), config.intermediates
        extra = _nothing if kind == "none" else partial(write_steps, pictures_TBCHW=shown_TRCHW, kind=kind)
        return _publish(self.result, pictures_RHWC, self.facts, extra)


def reconstruct(
    places: Sequence[int],
    results: Mapping[int, Sequence[Result]],
    config: Config,
    sampler: GuidedSampler,
    targets: ImageTargets,
) -> list[Reconstruction]:
    """Make the missing repeats of some images at the points of a family, in one forward batch.

    Args:
        places: The image at each place of the batch. What an image comes to may depend, by rounding, on the number of
            places and on its own place, but not on its neighbours.
        results: Image -> points of one family that are missing, the same for every image, from the same repeat on;
            others only fill places.
        config: The recipe at these points: seed, number of repeats.
        sampler: Its guided sampler.
        targets: Decoded (or true) targets.
    """
    some = next(iter(results.values()))
    points, repeats = [result.point for result in some], range(some[0].first, config.evaluation.num_repeats)
    requests = [NoiseRequest(image, repeat, config.seed) for image in places for repeat in repeats]
    num_repeats = len(repeats)
    names = (SEMANTIC, INITIAL, *(sampler.guidance_targets if any(point.is_guided for point in points) else ()))
    rows = {name: _repeated(targets, name, places, num_repeats) for name in dict.fromkeys(names)}
    made = sample_family(sampler, rows, requests, points, has_intermediates=config.sampler.intermediates != "none")
    found = []
    for image_id, wanted in results.items():
        first = places.index(image_id) * num_repeats
        own = slice(first, first + num_repeats)
        for result, sampled in zip(wanted, made, strict=True):
            failures = [failure for failure in sampled.failures if first <= failure.row < first + num_repeats]
            facts = {
                "image_id": image_id,
                "noise_seeds": _noise_seeds(config, requests[own]),
                "failures": [failure.describe() for failure in failures],
            }
            failed = tuple(failure.row - first for failure in failures)
            steps_TRCHW = sampled.intermediates_TBCHW[:, own]
            found.append(Reconstruction(result, sampled.images_BCHW[own], steps_TRCHW, failed, facts))
    return found


def _nothing(_staging: Path) -> None:
    """Write no further file."""


def sample_family(
    sampler: GuidedSampler,
    rows: Mapping[str, torch.Tensor],
    requests: Sequence[NoiseRequest],
    points: Sequence[Point],
    has_intermediates: bool = False,
) -> list[SampleResult]:
    """Return the pictures of each point of a family, sharing the steps that the points have in common.

    Runs of one kappa are the same until the first of them stops being guided. So the run with the largest eta is made,
    and the others go on from its latents: the same bits as alone, in fewer steps.
    """
    targets = {name: rows[name] for name in sampler.guidance_targets if name in rows}
    last = max(points, key=lambda point: point.eta)
    kappa = last.kappa if last.is_guided else 0.0
    guided_steps = [_num_guided(sampler.plan(kappa, point.eta)) for point in points]
    kept: dict[int, torch.Tensor] = {}
    count = itertools.count(1)

    def keep(record: StepRecord) -> None:
        if (done := next(count)) in guided_steps:
            kept[done] = record.latents_BCHW

    def run(eta: float, options: SampleOptions) -> SampleResult:
        options = replace(options, intermediates=has_intermediates)
        return sampler.sample(rows[SEMANTIC], rows[INITIAL], targets, requests, kappa, eta, options)

    longest = run(last.eta if last.is_guided else 0.0, SampleOptions(observe=keep))
    made = []
    for point, done in zip(points, guided_steps, strict=True):
        if point == last or done == _num_guided(sampler.plan(kappa, last.eta)):
            made.append(longest)
        elif done == 0:
            made.append(run(0.0, SampleOptions()))
        else:
            later = run(point.eta, SampleOptions(resume=(done, kept[done])))
            made.append(joined(longest, later, sampler.plan(kappa, point.eta).steps, done))
    return made


def _num_guided(plan: StepPlan) -> int:
    return sum(step.is_guided for step in plan.steps)


def copy_picture(result: Result, source: Source, picture_id: int, image_id: int, num_repeats: int) -> bool:
    """Publish a training picture in place of each repeat (control ``nearest``); False where another rank was first."""
    picture_HWC = source.pictures([picture_id])[0]
    facts = {"image_id": image_id, "nearest": picture_id}
    return _publish(result, np.stack([picture_HWC] * (num_repeats - result.first)), facts)


def _publish(
    result: Result,
    pictures_RHWC: npt.NDArray[np.uint8],
    facts: Mapping[str, Any],
    extra: Callable[[Path], None] = _nothing,
) -> bool:
    """Publish the repeats of one image with their hashes, and what ``extra`` writes beside them.

    Repeats that are there already stay as they are.
    """
    before = read_record(result.folder) if result.first else {}
    files: dict[str, str] = dict(before.get("files", {}))
    record = {**facts, "files": files}
    record |= {name: [*before[name], *facts[name]] for name in ("noise_seeds", "failures") if before and name in facts}

    def write(staging: Path) -> None:
        for name in files:
            os.link(result.folder / name, staging / name)
        for repeat, picture_HWC in enumerate(pictures_RHWC, start=result.first):
            write_png(staging / repeat_file(repeat), picture_HWC)
            files[repeat_file(repeat)] = sha256_file(staging / repeat_file(repeat))
        extra(staging)
        if before:
            shutil.rmtree(result.folder)

    return publish(result.folder, result.fingerprint, record, write)


def store_original(folder: Path, fingerprint: str, source: Source, image_id: int) -> bool:
    """Publish the picture that was seen; False where another rank was first."""
    picture_HWC = source.pictures([image_id])[0]
    facts = {"image_id": image_id}
    return publish(folder, fingerprint, facts, lambda staging: write_png(staging / PICTURE, picture_HWC))


def _repeated(targets: ImageTargets, name: str, image_ids: Sequence[int], num_repeats: int) -> torch.Tensor:
    """Return each image's target once per repeat."""
    return torch.from_numpy(np.ascontiguousarray(targets.rows(name, image_ids))).repeat_interleave(num_repeats, dim=0)


def _noise_seeds(config: Config, requests: Sequence[NoiseRequest]) -> list[int]:
    """Return the noise seed of each repeat for the record (``noise=official`` has fixed draws instead)."""
    if config.sampler.noise == "official":
        return []
    return [unit_seed(request.run_seed, "noise", request.image_id, request.repeat) for request in requests]
