"""What an evaluation consists of: guidance points, reconstructions, and the groups that ranks claim. Pure values.

Who does what is decided elsewhere (``leases``); nothing here knows of ranks, so composition never depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nd_dist.config import Config

UNGUIDED = "unguided"
ORIGINAL = "original"


@dataclass(frozen=True, order=True)
class Point:
    """One guidance setting.

    Args:
        kappa: Guidance scale; 0 is without guidance.
        eta: Guided share of the denoising steps; 0 is without guidance.
    """

    kappa: float
    eta: float

    @property
    def is_guided(self) -> bool:
        """Whether any step is guided."""
        return self.kappa > 0 and self.eta > 0

    @property
    def name(self) -> str:
        """Folder name; points without guidance share one, because they make the same pictures."""
        return f"kappa-{self.kappa:g}_eta-{self.eta:g}" if self.is_guided else UNGUIDED


@dataclass(frozen=True, order=True)
class Unit:
    """One reconstruction to make.

    Args:
        subject: Whose brain.
        kappa, eta: Guidance point.
        image_id: 0-based NSD image id.
        repeat: 0-based; a repeat differs from the next in its noise only.
    """

    subject: int
    kappa: float
    eta: float
    image_id: int
    repeat: int


@dataclass(frozen=True)
class Group:
    """The units that one rank claims at a time: some images of a subject at one point, with all their repeats.

    Args:
        point: Guidance point.
        subject: Whose brain.
        index: Position among the groups of (point, subject).
        image_ids: Images in this group, ascending.
        num_repeats: Reconstructions of each image.
    """

    point: Point
    subject: int
    index: int
    image_ids: tuple[int, ...]
    num_repeats: int

    @property
    def name(self) -> str:
        """Name of the group's lease."""
        return f"{self.point.name}_{subject_name(self.subject)}_{self.index:05d}"

    def units(self) -> Iterator[Unit]:
        """Yield the group's reconstructions in order."""
        for image_id in self.image_ids:
            for repeat in range(self.num_repeats):
                yield Unit(self.subject, self.point.kappa, self.point.eta, image_id, repeat)


def subject_name(subject: int) -> str:
    """Return NSD's name of a subject: 1 -> ``subj01``."""
    return f"subj{subject:02d}"


def image_name(image_id: int) -> str:
    """Return the folder name of an image: 12 -> ``image-00012``."""
    return f"image-{image_id:05d}"


def config_points(config: Config) -> tuple[Point, ...]:
    """Return the points of `nd evaluate`: the configured one, and without guidance before it where asked for."""
    guided = Point(config.sampler.kappa, config.sampler.eta)
    without = Point(0.0, 0.0)
    return (without, guided) if config.evaluation.baseline and guided.is_guided else (guided,)


def grid_points(config: Config) -> tuple[Point, ...]:
    """Return the points of `nd sweep`, kappa before eta, and the one without guidance first where asked for."""
    grid = [Point(kappa, eta) for kappa in config.sweep.kappa for eta in config.sweep.eta]
    has_unguided = any(not point.is_guided for point in grid)
    baseline = [Point(0.0, 0.0)] if config.evaluation.baseline and not has_unguided else []
    return tuple(dict.fromkeys([*baseline, *grid]))


def distinct_points(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return points that make different pictures, in order: all points without guidance count as one."""
    return tuple({point.name: point for point in reversed(list(points))}.values())[::-1]


def plan_groups(
    points: Iterable[Point], images: Mapping[int, Sequence[int]], batch_size: int, num_repeats: int
) -> list[Group]:
    """Return every group of an evaluation, in a fixed order.

    Args:
        points: Guidance points.
        images: Subject -> image ids.
        batch_size: Images in a group.
        num_repeats: Reconstructions of an image.
    """
    groups = []
    for point in distinct_points(points):
        for subject in sorted(images):
            ids = sorted(images[subject])
            for index, start in enumerate(range(0, len(ids), batch_size)):
                groups.append(Group(point, subject, index, tuple(ids[start : start + batch_size]), num_repeats))
    return groups
