"""Second stores of half the size: a target's records as int8, with one scale a channel for the whole store.

They are made from the packed target, so no network runs again. The scale is the largest magnitude of a channel over
all images / 127; a channel is the last axis of tokens (L, D) and the first of a latent (C, H, W). A record's relative
error is about 1 % (0.9 to 1.2 % on hidden states of a transformer). A store that grows keeps its scale, so that no
shard is written again: a value beyond the magnitudes that were there first is stored as the largest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.comm import Comm
from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.events import EventLog
from nd_dist.schema import TARGETS
from shards.format.codec import CHECKSUM, DTYPES, image_key, image_shard_path, int8_store, member_field, npy_header
from shards.format.index import VERSION
from shards.format.writer import open_shard
from shards.packing.held import last_index, number_of
from shards.packing.receipts import PACKED_IMAGE_ROW, Receipt, is_whole, read_receipts, write_receipt
from shards.places.store import FolderStore
from shards.reading.records import ShardFiles

INT8_DTYPE = "|i1"
INT8_MAX = 127


@dataclass(frozen=True)
class Int8Shard:
    """A shard of an int8 store that is to be written.

    Args:
        target: Name of the target.
        source: Receipt of the target's shard.
        recipe: What the bytes depend on.
    """

    target: str
    source: Receipt
    recipe: Mapping[str, object]

    @property
    def path(self) -> str:
        """Path of the shard below the shards' folder."""
        return image_shard_path(int8_store(self.target), self.source.shard.group, number_of(self.source.shard))


def channel_peaks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Return the largest magnitude of every channel of records (N, *shape), in a shape that broadcasts over one."""
    axes = (0, 2, 3) if values.ndim == 4 else tuple(range(values.ndim - 1))
    return np.asarray(np.abs(values).max(axis=axes, keepdims=True)[0], dtype=np.float32)


def to_int8(values: npt.NDArray[np.floating], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Return records in units of ``scale``, rounded."""
    return np.asarray(np.clip(np.rint(values.astype(np.float32) / scale), -INT8_MAX, INT8_MAX), dtype=np.int8)


def find_scales(config: Config, receipts: Mapping[str, Receipt]) -> dict[str, npt.NDArray[np.float32]]:
    """Return target -> scales, of the targets that get or have an int8 store.

    They are those of the index; for a new store they follow from the magnitudes of all its images.
    """
    folder, scales = config.shards_folder, {}
    index, present = last_index(folder), {receipt.shard.kind for receipt in read_receipts(folder).values()}
    for target in TARGETS:
        store, peaks = int8_store(target), [r.peaks for r in receipts.values() if r.shard.kind == target]
        if not peaks or not (target in config.data.int8_targets or store in present):
            continue
        if index is not None and store in index.features:
            with suppress(DataError):  # the file is damaged: the receipts know
                scales[target] = index.scale(store)
                continue
        peak = np.maximum.reduce(peaks)
        scales[target] = np.where(peak > 0, peak / np.float32(INT8_MAX), np.float32(1)).astype(np.float32)
    return scales


def find_int8(
    folder: Path, receipts: Mapping[str, Receipt], scales: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[dict[str, Receipt], list[Int8Shard]]:
    """Return the receipts of int8 shards that are done, and what is to be written.

    An int8 shard of another source or scale is written again: unlike a packed shard it costs nothing but time.
    """
    finished, pending = {}, []
    done = read_receipts(folder)
    for target, scale in scales.items():
        scale_sha256 = hashlib.sha256(scale.tobytes()).hexdigest()
        for source in (receipt for receipt in receipts.values() if receipt.shard.kind == target):
            recipe = {
                "format": VERSION,
                "checksum": CHECKSUM,
                "source_sha256": source.shard.sha256,
                "scale_sha256": scale_sha256,
            }
            shard = Int8Shard(target, source, recipe)
            receipt = done.get(shard.path)
            if receipt is None or receipt.recipe != recipe or not is_whole(folder, receipt.shard):
                pending.append(shard)
            else:
                finished[shard.path] = receipt
    return finished, pending


def pack_int8(
    config: Config, receipts: Mapping[str, Receipt] | None, comm: Comm, events: EventLog
) -> dict[str, Receipt]:
    """Write the int8 stores on all ranks and return their receipts on rank 0; every rank calls it.

    Args:
        config: The recipe.
        receipts: Rank 0: receipts of all packed shards.
        comm: The ranks that share the work.
        events: Gets progress in images.
    """
    work = None
    if receipts is not None:
        scales = find_scales(config, receipts)
        work = (scales, *find_int8(config.shards_folder, receipts, scales))
    scales, finished, pending = comm.broadcast(work)
    mine: list[Int8Shard] = pending[comm.rank :: comm.size]
    done, total = 0, sum(shard.source.shard.samples for shard in mine)
    written = []
    for shard in mine:
        written.append(_write(config.shards_folder, shard, scales[shard.target], DTYPES[config.data.target_dtype]))
        done += shard.source.shard.samples
        events.progress("int8", done, total)
    new = [receipt for part in comm.gather(written) for receipt in part]
    return {**finished, **{receipt.shard.path: receipt for receipt in new}}


def _named(key: str, position: int) -> str:
    """Return the name of the only record of a reading."""
    del position
    return key


def _write(folder: Path, shard: Int8Shard, scale: npt.NDArray[np.float32], dtype: str) -> Receipt:
    """Write one shard and its receipt."""
    store, source = int8_store(shard.target), shard.source
    files = ShardFiles(FolderStore(folder), [source.shard])
    rows = source.rows
    rows["shard"] = 0
    header = npy_header(INT8_DTYPE, source.shape)
    record = np.empty((1, *source.shape), dtype=dtype)
    with open_shard(folder / shard.path) as writer:
        for image_id, row in zip(rows["image"].tolist(), np.split(rows, len(rows)), strict=True):
            key = image_key(image_id)
            files.read(row, record, partial(_named, key))
            writer.add_array(key, member_field(store), header, to_int8(record[0], scale).tobytes())
    files.close()
    written = np.zeros(len(rows), dtype=PACKED_IMAGE_ROW)
    written["image"] = rows["image"]
    writer.locate(written)
    info = writer.info(shard.path, store, source.shard.group)
    receipt = Receipt.make(info, shard.recipe, source.shape, written)
    write_receipt(folder, receipt)
    return receipt
