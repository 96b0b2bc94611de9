"""What an evaluation costs: denoising steps of each unit, seconds per step from a short calibration, GPU-hours of all.

Pure functions. A unit is one image with all its repeats at the points of a family; guided and plain steps cost
differently, so two measurements of different eta give both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nd_dist.config import Config
from nd_dist.evaluation.points.units import Bundle, Point

SECONDS_PER_HOUR = 3600.0
MANY_FILES, MANY_BYTES = 100_000, 300e9  # what quotas of clusters often allow
GUIDED_STEPS = 3.5  # plain steps that a guided one is worth until it is measured: it goes back through the UNet


@dataclass(frozen=True)
class StepCount:
    """Denoising steps of one unit.

    Args:
        guided, plain: Steps with and without the guidance gradient, of one image with all its repeats.
    """

    guided: int
    plain: int


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of one image with all its repeats; decoding and judging are spread over the steps."""

    guided_s: float = GUIDED_STEPS
    plain_s: float = 1.0

    def seconds(self, work: StepCount) -> float:
        """Return the seconds of a unit."""
        return self.guided_s * work.guided + self.plain_s * work.plain


def unit_steps(config: Config, points: Sequence[Point]) -> StepCount:
    """Return the steps of one image at the points of a family, which share their guided steps.

    Args:
        config: The recipe at these points (steps and strength).
        points: Points of one family.
    """
    if points[0].control == "nearest":
        return StepCount(0, 0)
    steps = max(1, int(config.sampler.num_steps * config.sampler.strength))
    guided = [int(steps * point.eta) if point.is_guided else 0 for point in points]
    return StepCount(max(guided), sum(steps - count for count in guided))


def fit_cost(measured: Sequence[tuple[StepCount, float]]) -> StepCost:
    """Return seconds per step from measured units; one measurement alone keeps the usual ratio of the two kinds.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("a cost needs at least one measured unit")
    works = np.array([[work.guided, work.plain] for work, _ in measured], dtype=np.float64)
    seconds = np.array([value for _, value in measured])
    if np.linalg.matrix_rank(works) == 2:
        guided_s, plain_s = np.linalg.lstsq(works, seconds, rcond=None)[0].tolist()
        if guided_s >= plain_s > 0:
            return StepCost(guided_s, plain_s)
    usual = StepCost()
    scale = math.fsum(seconds) / math.fsum(usual.seconds(work) for work, _ in measured)
    return StepCost(usual.guided_s * scale, usual.plain_s * scale)


@dataclass(frozen=True)
class Estimate:
    """What is left to do.

    Args:
        units: Images (with all repeats) still to be made, over all families.
        gpu_hours: Hours of one GPU (or CPU rank).
        ranks: Ranks that share it.
    """

    units: int
    gpu_hours: float
    ranks: int

    @property
    def wall_hours(self) -> float:
        """Hours on the clock if all ranks are equally fast."""
        return self.gpu_hours / self.ranks

    def describe(self) -> str:
        """Return the estimate in one line."""
        one, all_ranks = (duration(hours * SECONDS_PER_HOUR) for hours in (self.gpu_hours, self.wall_hours))
        return (
            f"estimate: {self.units} unit(s) to make (an image at the points of one kappa), {one} of one rank "
            f"({self.gpu_hours:.3g} GPU-hours), about {all_ranks} with {self.ranks} rank(s)"
        )


def estimate(
    unfinished: Sequence[tuple[Bundle, int, StepCount]], costs: Mapping[str, StepCost], ranks: int
) -> Estimate:
    """Return what unfinished bundles cost.

    Args:
        unfinished: Groups with the number of their images that are still to be made, and the work of one.
        costs: Cost class -> seconds per step.
        ranks: Ranks that share the work.
    """
    seconds = math.fsum(costs[cost_class(bundle.points[0])].seconds(work) * num for bundle, num, work in unfinished)
    return Estimate(sum(num for _, num, _ in unfinished), seconds / SECONDS_PER_HOUR, ranks)


@dataclass(frozen=True)
class DiskUse:
    """What the reconstructions of a sweep take on disk.

    Args:
        images: Images, those of every point and subject counted apart.
        kept: How many of these keep their pictures once they are scored.
        open: How many have their features on disk at a time.
        num_repeats: Reconstructions of an image.
        picture_bytes, feature_bytes: Of one reconstruction, as measured.
    """

    images: int
    kept: int
    open: int
    num_repeats: int
    picture_bytes: float
    feature_bytes: float

    @property
    def files(self) -> int:
        """Files that stay: the pictures of an image, and their record."""
        return self.kept * (self.num_repeats + 1)

    @property
    def end_bytes(self) -> float:
        """Bytes of the pictures that stay."""
        return self.kept * self.num_repeats * self.picture_bytes

    @property
    def most_bytes(self) -> float:
        """Bytes while it runs, features included."""
        return self.end_bytes + self.open * self.num_repeats * (self.picture_bytes + self.feature_bytes)

    def describe(self, groups: int) -> str:
        """Return this in one line, and how it would be less where it is much.

        Args:
            groups: Points times subjects.
        """
        told = (
            f"disk: {self.files:,} files and {self.end_bytes / 1e9:.3g} GB of pictures stay, "
            f"up to {self.most_bytes / 1e9:.3g} GB with features while it runs"
        )
        if self.files <= MANY_FILES and self.most_bytes <= MANY_BYTES:
            return told
        fewer = MANY_FILES // (groups * (self.num_repeats + 1))
        return f"{told}; evaluation.keep_pictures={fewer} keeps those of {fewer} images a point: {MANY_FILES:,} files"


def cost_class(point: Point) -> str:
    """Return the name of the points whose steps cost the same: seeds and controls do not matter, settings do."""
    settings = tuple(pair for pair in point.settings if pair[0] != "seed")
    return Point(0.0, 0.0, settings).name


def duration(seconds: float) -> str:
    """Return a time span as people say it: 40 s, 12 min, 3.4 h, 2.1 d."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / SECONDS_PER_HOUR
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"
