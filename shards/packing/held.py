"""What a folder of shards holds before more is packed into it, so that it grows and nothing is packed again.

An image shard keeps its images, whatever subjects and sessions come later: new images go into new shards. What the
index lists stays listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nd_dist.errors import DataError
from shards.format.index import INDEX_NAME, TRIALS, Index, ShardInfo
from shards.packing.receipts import RECEIPTS_DIR, Receipt, is_whole, read_receipts
from shards.places.store import FolderStore

PREVIOUS_INDEX = f"{RECEIPTS_DIR}/previous.json"
"""The index while a new one is being written."""
_NUMBER = re.compile(r"-e?(\d+)(-test)?\.tar")


@dataclass(frozen=True)
class Held:
    """What planning needs to know of a folder.

    Args:
        listed: Shards that the index lists.
        broken: Those of them that are not whole; they are packed again, whatever is asked for.
        image_units: (group, number) -> ascending ids of the images that every store's shard of this name holds.
    """

    listed: frozenset[str] = frozenset()
    broken: tuple[ShardInfo, ...] = ()
    image_units: Mapping[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)


def number_of(shard: ShardInfo) -> int:
    """Return the session of a trial shard, or the number of an image shard in its group."""
    match = _NUMBER.search(shard.path)
    assert match is not None, "the packer names shards"
    return int(match[1])


def last_index(folder: Path) -> Index | None:
    """Return the index that a folder has, or had when a packer was killed; None where there is no sound one."""
    for name in (INDEX_NAME, PREVIOUS_INDEX):
        with suppress(OSError, DataError):
            return Index.parse((folder / name).read_bytes(), FolderStore(folder))
    return None


def read_held(folder: Path) -> Held:
    """Return what a folder holds.

    Raises:
        DataError: a receipt is damaged, or shards of one name hold different images.
    """
    receipts, index = read_receipts(folder), last_index(folder)
    if index is not None:
        shards = list(index.shards)
    else:  # without a sound index everything that is whole counts, where there ever was one
        known = [receipt.shard for receipt in receipts.values() if is_whole(folder, receipt.shard)]
        shards = known if (folder / INDEX_NAME).exists() else []
    units: dict[tuple[str, int], tuple[int, ...]] = {}
    for number, shard in enumerate(shards):
        if shard.kind != TRIALS and shard.path not in receipts and index is not None:
            with suppress(DataError):
                ids = np.flatnonzero(index.table(shard.kind)["shard"] == number)
                units[shard.group, number_of(shard)] = tuple(ids.tolist())
    for receipt in receipts.values():
        if receipt.shard.kind != TRIALS:
            _add_unit(units, receipt, folder)
    broken = [shard for shard in shards if shard.path not in receipts or not is_whole(folder, shard)]
    return Held(frozenset(shard.path for shard in shards), tuple(broken), units)


def _add_unit(units: dict[tuple[str, int], tuple[int, ...]], receipt: Receipt, folder: Path) -> None:
    """Add the images of a shard.

    Raises:
        DataError: the shard of another store with this name holds other images.
    """
    ids = tuple(receipt.rows["image"].tolist())
    if units.setdefault((receipt.shard.group, number_of(receipt.shard)), ids) != ids:
        raise DataError(
            "Two stores of this folder hold different images in shards of one name.",
            where=str(folder / receipt.shard.path),
            todo="choose another shards_dir, or delete this one",
        )
