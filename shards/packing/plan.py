"""What packing will do: the units of work, which images go where, and how many bytes. Pure; reads no betas.

A unit is what one rank does at a time and what a restart repeats at most: one session of one subject, or one shard's
worth of images for all stores that lack it. Units depend on the data only, never on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config, DataConfig
from nd_dist.errors import ConfigError, DataError
from nd_dist.schema import SEMANTIC, TARGETS, TargetSpec
from shards.format.codec import DTYPES, NPY_HEADER_BYTES, PICTURES, image_shard_path, int8_store, trial_shard_path
from shards.format.index import TRIALS
from shards.format.writer import TAR_BLOCK_BYTES
from shards.packing.held import Held, number_of, read_held
from shards.sources.contract import DatasetReader, SubjectDesign
from shards.sources.open import open_reader

SHARED_GROUP = "shared"
TAR_RECORD_BYTES = 10_240
PNG_SHARE = 0.55  # PNG's share of raw bytes on photographs, for estimates


@dataclass(frozen=True)
class TrialUnit:
    """One session of one subject: one trial shard.

    Args:
        subject: The subject.
        session: The session.
        only_test: Whether only its test trials are packed, as its training trials were not asked for.
    """

    subject: int
    session: int
    only_test: bool = False

    @property
    def path(self) -> str:
        """Path of the shard below the shards' folder."""
        return trial_shard_path(self.subject, self.session, self.only_test)

    def trials(self, design: SubjectDesign) -> npt.NDArray[np.int64]:
        """Return the 0-based trials that are packed."""
        trials = design.trials_of(self.session)
        return trials[design.is_test[trials]] if self.only_test else trials


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
        designs: Subject -> what it saw, whether all of that is packed or not.
        units: Units in order.
        fitted: Subject -> sessions whose training trials are or were packed; a z-scoring by subject is fitted on them.
        num_images: Image ids of the data set.
        num_packed_images: Images whose targets are made.
        shards: What will be written.
        unknown_targets: Targets whose bytes are not counted, because no network told their shape.
    """

    designs: Mapping[int, SubjectDesign] = field(repr=False)
    units: tuple[Unit, ...] = field(repr=False)
    fitted: Mapping[int, tuple[int, ...]] = field(repr=False)
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
        trials = [unit for unit in self.units if isinstance(unit, TrialUnit)]
        return sum(len(unit.trials(self.designs[unit.subject])) for unit in trials)

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
    held = read_held(config.shards_folder)
    return plan(config.data, open_reader(config), specs, held)


def plan(
    data: DataConfig, reader: DatasetReader, specs: Sequence[TargetSpec] = (), held: Held | None = None
) -> PackPlan:
    """Return the plan of packing what a reader reads into a folder that holds something already; see ``plan_pack``.

    Raises:
        ConfigError: a target is wanted that the extractor does not make.
        DataError: a subject has nothing to pack, or the folder's shards are larger than is asked for now.
    """
    held = held or Held()
    repairs = [TrialUnit(int(s.group[1:]), number_of(s), "-test" in s.path) for s in held.broken if s.kind == TRIALS]
    designs = {s: reader.design(s) for s in sorted({*data.subjects, *(unit.subject for unit in repairs)})}
    wanted = {subject: list(_trial_units(designs[subject], data)) for subject in sorted(data.subjects)}
    groups = image_groups([_packed(designs[subject], trials) for subject, trials in wanted.items()])
    pending = {unit for trials in wanted.values() for unit in trials if not _is_listed_whole(unit, held)}
    trial_units = sorted({*pending, *repairs}, key=lambda unit: (unit.subject, unit.session, unit.only_test))
    units: tuple[Unit, ...] = (*trial_units, *_image_units(groups, data, held))
    if SEMANTIC in data.targets:
        reader.captions([image_id for ids in groups.values() for image_id in ids])
    shapes = {spec.name: spec.shape for spec in specs}
    targets = {name: None for unit in units if isinstance(unit, ImageUnit) for name in unit.stores if name != PICTURES}
    if specs and (missing := [name for name in targets if name not in shapes]):
        raise ConfigError("The extractor does not make these targets.", where="data.targets", found=missing)
    picture_shape = reader.pictures([0]).shape[1:]
    return PackPlan(
        designs=designs,
        units=units,
        fitted={
            subject: tuple(s for s in design.sessions if _has_training(TrialUnit(subject, s), trial_units, held))
            for subject, design in designs.items()
        },
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


def _is_listed_whole(unit: TrialUnit, held: Held) -> bool:
    """Return whether test trials need no shard of their own, because the whole session was packed before."""
    return unit.only_test and replace(unit, only_test=False).path in held.listed


def _has_training(unit: TrialUnit, planned: Collection[TrialUnit], held: Held) -> bool:
    """Return whether the whole session of a unit is or was packed."""
    return unit in planned or unit.path in held.listed


def _trial_units(design: SubjectDesign, data: DataConfig) -> Iterator[TrialUnit]:
    """Yield one unit a session: whole up to ``data.max_sessions``, then the test trials alone.

    Raises:
        DataError: there is nothing to train on.
    """
    last = data.max_sessions or max(design.sessions)
    if last < min(design.sessions):
        raise DataError(f"Subject {design.subject} has no session to train on.", where="data.max_sessions", found=last)
    for session in design.sessions:
        unit = TrialUnit(design.subject, session)
        if session <= last:
            yield unit
        elif session <= (data.max_test_sessions or session):
            unit = replace(unit, only_test=True)
            if len(unit.trials(design)):
                yield unit


def _packed(design: SubjectDesign, units: Sequence[TrialUnit]) -> SubjectDesign:
    """Return the part of a design that is packed."""
    kept = np.concatenate([unit.trials(design) for unit in units])
    return replace(design, session=design.session[kept], image_id=design.image_id[kept], is_test=design.is_test[kept])


def _image_units(groups: Mapping[str, Sequence[int]], data: DataConfig, held: Held) -> Iterator[ImageUnit]:
    """Yield the images of every group, a shard's worth at a time; those that the folder holds keep their shard.

    Raises:
        DataError: the folder has larger shards than are asked for.
    """
    known = {image_id: unit for unit, ids in held.image_units.items() for image_id in ids}
    stores: dict[tuple[str, int], list[str]] = {}
    images = dict(held.image_units)
    for group, ids in groups.items():
        has_pictures = data.pictures == "all" or (data.pictures == "test" and group == SHARED_GROUP)
        wanted = [*data.targets, *([PICTURES] if has_pictures else [])]
        if not wanted:
            continue
        new = [image_id for image_id in ids if image_id not in known]
        numbers = (number for number in count() if (group, number) not in held.image_units)
        for start, number in zip(range(0, len(new), data.images_per_shard), numbers, strict=False):
            images[group, number] = tuple(new[start : start + data.images_per_shard])
            stores[group, number] = wanted
        for unit in dict.fromkeys(known[image_id] for image_id in ids if image_id in known):
            stores[unit] = list(dict.fromkeys([*stores.get(unit, []), *wanted]))
            if len(images[unit]) > data.images_per_shard:
                raise DataError(
                    "This folder holds a shard that was packed with other settings or from other data.",
                    where=image_shard_path(wanted[0], *unit),
                    expected=f"images_per_shard: {data.images_per_shard}",
                    found=f"images_per_shard: {len(images[unit])}",
                    todo="choose another shards_dir, or set data.images_per_shard back",
                )
    for shard in held.broken:
        unit = shard.group, number_of(shard)
        if shard.kind in (*TARGETS, PICTURES) and shard.kind not in stores.get(unit, []):
            stores.setdefault(unit, []).append(shard.kind)
    order = {group: position for position, group in enumerate([SHARED_GROUP, *groups])}
    for group, number in sorted(stores, key=lambda unit: (order.get(unit[0], len(order)), *unit)):
        yield ImageUnit(group, number, images[group, number], tuple(stores[group, number]))


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
            samples = len(unit.trials(design))
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
