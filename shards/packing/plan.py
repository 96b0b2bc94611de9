"""What packing will do: the units of work, which images go where, and how many bytes. Pure; reads no betas.

A unit is what one rank does at a time and what a restart repeats at most: one session of one subject, or one shard's
worth of images for all stores that lack it. Units depend on the data only, never on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from nd_dist.config import Config, DataConfig
from nd_dist.errors import ConfigError
from nd_dist.schema import SEMANTIC, TargetSpec
from shards.format.codec import DTYPES, NPY_HEADER_BYTES, PICTURES, image_shard_path, int8_store, trial_shard_path
from shards.format.writer import TAR_BLOCK_BYTES
from shards.sources.contract import DatasetReader, SubjectDesign
from shards.sources.open import open_reader

SHARED_GROUP = "shared"
TAR_RECORD_BYTES = 10_240
PNG_SHARE = 0.55  # PNG's share of raw bytes on photographs, for estimates


@dataclass(frozen=True)
class TrialUnit:
    """One session of one subject: one trial shard."""

    subject: int
    session: int

    @property
    def path(self) -> str:
        """Path of the shard below the shards' folder."""
        return trial_shard_path(self.subject, self.session)


@dataclass(frozen=True)
class ImageUnit:
    """The images of one shard of every image-keyed store.

    Args:
        group: Who sees the images: ``shared``, ``s01`` ...
        number: Shard number in the group.
        image_ids: Ascending.
        stores: Stores that hold these images.
    """

    group: str
    number: int
    image_ids: tuple[int, ...]
    stores: tuple[str, ...]

    def path(self, store: str) -> str:
        """Path of a store's shard below the shards' folder."""
        return image_shard_path(store, self.group, self.number)


Unit = TrialUnit | ImageUnit


@dataclass(frozen=True)
class PlannedShard:
    """A shard that will be written.

    Args:
        path: Below the shards' folder.
        samples: Trials or images.
        num_bytes: Size, exact for trials and targets, estimated for pictures, 0 where a target's shape is unknown.
    """

    path: str
    samples: int
    num_bytes: int


@dataclass(frozen=True)
class PackPlan:
    """Everything that packing will do.

    Args:
        designs: Subject -> what it saw.
        units: Units in order.
        num_images: Image ids of the data set.
        num_packed_images: Images whose targets are made.
        shards: What will be written.
        unknown_targets: Targets whose bytes are not counted, because no network told their shape.
    """

    designs: Mapping[int, SubjectDesign] = field(repr=False)
    units: tuple[Unit, ...] = field(repr=False)
    num_images: int
    num_packed_images: int
    shards: tuple[PlannedShard, ...] = field(repr=False)
    unknown_targets: tuple[str, ...]

    @property
    def image_units(self) -> tuple[ImageUnit, ...]:
        """The units of images, in order."""
        return tuple(unit for unit in self.units if isinstance(unit, ImageUnit))

    @property
    def num_shards(self) -> int:
        """Number of tars."""
        return len(self.shards)

    @property
    def num_trials(self) -> int:
        """Number of trials."""
        return sum(design.num_trials for design in self.designs.values())

    def describe(self) -> str:
        """Return one line for people."""
        unknown = f", sizes of {', '.join(self.unknown_targets)} not counted" if self.unknown_targets else ""
        return (
            f"{self.num_shards} shards, {self.num_bytes / 1e6:,.1f} MB{unknown}: {self.num_trials:,} trials of "
            f"{len(self.designs)} subjects, {self.num_packed_images:,} images"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars whose size is known."""
        return sum(shard.num_bytes for shard in self.shards)


def plan_pack(config: Config, specs: Sequence[TargetSpec] = ()) -> PackPlan:
    """Return the plan of a recipe, after checking that every file that it needs exists and fits.

    Args:
        config: The recipe.
        specs: Shapes of the targets where they are known (from an extractor); without them their bytes are unknown.

    Raises:
        DataError: something is missing or contradicts itself.
    """
    return plan(config.data, open_reader(config), specs)


def plan(data: DataConfig, reader: DatasetReader, specs: Sequence[TargetSpec] = ()) -> PackPlan:
    """Return the plan of packing what a reader reads; see ``plan_pack``.

    Raises:
        ConfigError: a target is wanted that the extractor does not make.
    """
    designs = {subject: reader.design(subject) for subject in sorted(data.subjects)}
    groups = image_groups(designs.values())
    units: tuple[Unit, ...] = (*_trial_units(designs), *_image_units(groups, data))
    if SEMANTIC in data.targets:
        reader.captions([image_id for ids in groups.values() for image_id in ids])
    shapes = {spec.name: spec.shape for spec in specs}
    if specs and (missing := [name for name in data.targets if name not in shapes]):
        raise ConfigError("The extractor does not make these targets.", where="data.targets", found=missing)
    picture_shape = reader.pictures([0]).shape[1:]
    return PackPlan(
        designs=designs,
        units=units,
        num_images=reader.num_images,
        num_packed_images=sum(len(ids) for ids in groups.values()),
        shards=tuple(_planned_shards(units, designs, data, shapes, picture_shape)),
        unknown_targets=tuple(name for name in data.targets if name not in shapes),
    )


def image_groups(designs: Collection[SubjectDesign]) -> dict[str, list[int]]:
    """Return group -> ascending ids of the images that were seen: ``shared`` first, then each subject's own.

    An image that several subjects saw without being shared belongs to the first of them.
    """
    groups: dict[str, list[int]] = {SHARED_GROUP: []}
    taken: set[int] = set()
    shared = np.unique(np.concatenate([design.image_id[design.is_test] for design in designs]))
    groups[SHARED_GROUP] = shared.tolist()
    taken.update(groups[SHARED_GROUP])
    for design in designs:
        own = [image_id for image_id in np.unique(design.image_id).tolist() if image_id not in taken]
        taken.update(own)
        groups[f"s{design.subject:02d}"] = own
    return {group: ids for group, ids in groups.items() if ids}


def _trial_units(designs: Mapping[int, SubjectDesign]) -> Iterator[TrialUnit]:
    """Yield one unit a subject and session."""
    for subject, design in designs.items():
        for session in design.sessions:
            yield TrialUnit(subject, session)


def _image_units(groups: Mapping[str, Sequence[int]], data: DataConfig) -> Iterator[ImageUnit]:
    """Yield the images of every group, a shard's worth at a time."""
    for group, ids in groups.items():
        has_pictures = data.pictures == "all" or (data.pictures == "test" and group == SHARED_GROUP)
        stores = (*data.targets, *((PICTURES,) if has_pictures else ()))
        if not stores:
            continue
        for number, start in enumerate(range(0, len(ids), data.images_per_shard)):
            yield ImageUnit(group, number, tuple(ids[start : start + data.images_per_shard]), stores)


def _planned_shards(
    units: Sequence[Unit],
    designs: Mapping[int, SubjectDesign],
    data: DataConfig,
    shapes: Mapping[str, tuple[int, ...]],
    picture_shape: tuple[int, ...],
) -> Iterator[PlannedShard]:
    """Yield every shard with its size."""
    voxel_bytes = np.dtype(DTYPES[data.voxel_dtype]).itemsize
    target_bytes = np.dtype(DTYPES[data.target_dtype]).itemsize
    for unit in units:
        if isinstance(unit, TrialUnit):
            design = designs[unit.subject]
            samples = len(design.trials_of(unit.session))
            size = NPY_HEADER_BYTES + design.num_voxels * voxel_bytes
            yield PlannedShard(unit.path, samples, tar_bytes(samples, size))
            continue
        for store in unit.stores:
            samples = len(unit.image_ids)
            if store == PICTURES:
                num_bytes = tar_bytes(samples, round(prod(picture_shape) * PNG_SHARE))
            elif store in shapes:
                num_bytes = tar_bytes(samples, NPY_HEADER_BYTES + prod(shapes[store]) * target_bytes)
            else:
                num_bytes = 0
            yield PlannedShard(unit.path(store), samples, num_bytes)
            if store in data.int8_targets:
                small = tar_bytes(samples, NPY_HEADER_BYTES + prod(shapes[store])) if store in shapes else 0
                yield PlannedShard(unit.path(int8_store(store)), samples, small)


def tar_bytes(num_members: int, member_bytes: int) -> int:
    """Return the size of a tar of equal members: headers, padding to 512, two empty blocks, padding to 10,240."""
    padded = -(-member_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    used = num_members * (TAR_BLOCK_BYTES + padded) + 2 * TAR_BLOCK_BYTES
    return -(-used // TAR_RECORD_BYTES) * TAR_RECORD_BYTES
