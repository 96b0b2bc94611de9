"""Sets of images in an index: named splits, groups, duplicates; and the index of a recipe, with the split it chose.

A split never leaks: what is tested for one subject of a recipe is trained on for none, nor is anything that the data
set declares to show the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config
from nd_dist.config.data import OWN_SPLIT
from nd_dist.errors import ConfigError, DataError
from nd_dist.seeds import splitmix64
from shards.format.index import DUPLICATES, GROUPS, SPLITS, Index
from shards.format.tables import MEMBER_ROW, SPLIT_ROW, TEST, TRAIN, UNUSED
from shards.sources.contract import ImageSets

_HELDOUT_KEY = 0x6E642D68656C646F  # a constant: all runs hold out the same images


def set_tables(sets: ImageSets, num_images: int) -> dict[str, npt.NDArray[Any]]:
    """Return the tables of what a data set declares of its images; none for what it does not.

    Raises:
        DataError: a set names an image that does not exist, or a split trains on what it tests.
    """
    splits = []
    for number, (name, by_subject) in enumerate(sets.splits.items()):
        for subject, images in by_subject.items():
            if len(both := np.intersect1d(images.train, images.test)):
                raise DataError(
                    "A split of the data set trains on images that it tests.",
                    where=f"split {name}, subject {subject}",
                    found=f"{len(both)} images, e.g. {both[0]}",
                )
            for part, ids in ((TRAIN, images.train), (TEST, images.test)):
                splits += [(number, subject, part, image_id) for image_id in np.unique(ids).tolist()]
    members = {GROUPS: sets.groups.values(), DUPLICATES: sets.duplicates}
    tables = {SPLITS: np.array(splits, dtype=SPLIT_ROW)} | {
        name: np.array([(n, i) for n, ids in enumerate(every) for i in sorted(set(ids))], dtype=MEMBER_ROW)
        for name, every in members.items()
    }
    for name, table in tables.items():
        if len(table) and int(table["image"].max()) >= num_images:
            found = int(table["image"].max())
            raise DataError(f"The {name} of the data set name an image that does not exist.", found=found)
    return {name: table for name, table in tables.items() if len(table)}


def open_index(config: Config) -> Index:
    """Return the index of a recipe's shards; its trials are train, test or unused as ``data.split`` says.

    Raises:
        DataError: there is no valid index.
        ConfigError: the shards hold no such split, or not for a subject.
    """
    return choose_split(Index.read(config.shards_dir, config.remote), config.data.split, config.data.subjects)


def choose_split(index: Index, name: str, subjects: Collection[int]) -> Index:
    """Return an index whose trials are those of a split.

    Args:
        index: The shards.
        name: The split.
        subjects: Those that train and test together; trials of others are unused, except in the data set's own split.

    Raises:
        ConfigError: the shards hold no such split, or not for a subject.
    """
    if name == OWN_SPLIT and DUPLICATES not in index.tables:
        return index
    rows = index.trials.copy()
    if name != OWN_SPLIT:
        rows["split"] = UNUSED
        for subject, part_N in _parts(index, name, subjects).items():
            own = rows["subject"] == subject
            rows["split"][own] = part_N[rows["image"][own]]
    same_N = representatives(index)
    tested = np.unique(same_N[rows["image"][rows["split"] == TEST]])
    rows["split"][(rows["split"] == TRAIN) & np.isin(same_N[rows["image"]], tested)] = UNUSED
    return index.with_tables({"trials": rows})


def split_sizes(index: Index, name: str, subject: int) -> tuple[int, int]:
    """Return how many test images a named split has of a subject, and how many of them are packed; (0, 0) for own."""
    if name == OWN_SPLIT:
        return 0, 0
    tested = np.flatnonzero(_parts(index, name, [subject])[subject] == TEST)
    return len(tested), int(np.isin(tested, index.trials["image"][index.trials["subject"] == subject]).sum())


def representatives(index: Index) -> npt.NDArray[np.int64]:
    """Return (num_images,) the first of the images that show (nearly) the same as each; mostly itself."""
    same_N = np.arange(index.num_images)
    if DUPLICATES in index.tables:
        table = index.table(DUPLICATES)
        for number in np.unique(table["set"]):
            members = table["image"][table["set"] == number]
            same_N[np.isin(same_N, same_N[members])] = same_N[members].min()  # sets that overlap become one
    return same_N


def image_groups(index: Index) -> dict[str, tuple[int, ...]]:
    """Return the groups of images that the data set declares: name -> image ids."""
    if GROUPS not in index.tables:
        return {}
    table = index.table(GROUPS)
    return {name: tuple(table["image"][table["set"] == n].tolist()) for n, name in enumerate(index.groups)}


def is_heldout(image_ids: npt.NDArray[np.integer[Any]], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which training images are held out for validation: a fixed share, chosen by image id alone.

    Images that show the same go by the id of their first (``representatives``), so they are held out together.
    """
    keys = splitmix64(splitmix64(image_ids.astype(np.uint64)) ^ np.uint64(_HELDOUT_KEY))
    return np.asarray(keys.astype(np.float64) < fraction * 2.0**64)


def _parts(index: Index, name: str, subjects: Collection[int]) -> Mapping[int, npt.NDArray[np.uint8]]:
    """Return subject -> part (num_images,) of every image in a named split.

    Raises:
        ConfigError: the shards hold no such split, or not for a subject.
    """
    known = (OWN_SPLIT, *index.splits)
    if name not in known:
        raise ConfigError(
            f"The shards hold no split {name!r}.",
            where="data.split",
            expected=f"one of {', '.join(known)}",
            todo="the data set declares its splits when it is packed (docs/shards.md)",
        )
    table = index.table(SPLITS)
    table = table[table["split"] == index.splits.index(name)]
    parts = {}
    for subject in subjects:
        own = table[table["subject"] == subject]
        if not len(own):
            raise ConfigError(f"The split {name!r} says nothing of subject {subject}.", where="data.split")
        parts[subject] = np.full(index.num_images, UNUSED, dtype=np.uint8)
        parts[subject][own["image"]] = own["part"]
    return parts
