"""Receipts: what packing remembers of every finished shard, so that it resumes after a kill at any moment.

A receipt is written after its shard, so a receipt means a whole shard. It names the recipe that the shard was made
by; a receipt of another recipe stops packing, because a folder must never mix two. Receipts stay after the index is
written: repairing and adding repeat only what is missing.
"""

from __future__ import annotations

import base64
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from nd_dist.errors import DataError
from nd_dist.files import PART_SUFFIX, is_running, read_json, write_json
from shards.format.index import TRIALS, ShardInfo, differing_fields
from shards.format.tables import IMAGE_ROW, TRIAL_ROW, Table

RECEIPTS_DIR = ".pack"
DAMAGED_SUFFIX = ".damaged"  # of a file that was set aside to be packed again
ABANDONED_S = 24 * 3600.0
# image shards: the rows of their store's table with the image id in front
PACKED_IMAGE_ROW = np.dtype([("image", "<u4"), *[(name, IMAGE_ROW[name]) for name in IMAGE_ROW.names or ()]])


class Receipt(BaseModel):
    """A finished shard, the recipe that it was made by, and its rows of the index's tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: ShardInfo
    recipe: dict[str, Any]
    shape: tuple[int, ...]
    rows_base64: str
    peaks_base64: str = ""
    peaks_shape: tuple[int, ...] = ()
    raw_base64: str = ""
    accepted: tuple[str, ...] = ()

    @staticmethod
    def make(
        shard: ShardInfo,
        recipe: Mapping[str, Any],
        shape: tuple[int, ...],
        rows: Table,
        peaks: npt.NDArray[np.float32] | None = None,
        raw: npt.NDArray[np.uint64] | None = None,
    ) -> Receipt:
        """Return the receipt of a shard; ``rows`` lack the shard's number, which the index gives.

        Args:
            shard: The shard.
            recipe: What its bytes depend on.
            shape: Shape of a record.
            rows: ``TRIAL_ROW`` or ``PACKED_IMAGE_ROW``.
            peaks: Targets: the largest magnitude of every channel, from which int8 scales follow.
            raw: Trials: (trials,) the checksum of every trial's betas before z-scoring.
        """
        return Receipt(
            shard=shard,
            recipe=dict(recipe),
            shape=shape,
            rows_base64=_base64(rows),
            peaks_base64="" if peaks is None else _base64(peaks),
            peaks_shape=() if peaks is None else peaks.shape,
            raw_base64="" if raw is None else _base64(raw),
        )

    @property
    def peaks(self) -> npt.NDArray[np.float32]:
        """The largest magnitude of every channel, in a shape that broadcasts over a record."""
        return np.frombuffer(base64.b64decode(self.peaks_base64), dtype=np.float32).reshape(self.peaks_shape)

    @property
    def raw(self) -> npt.NDArray[np.uint64]:
        """(trials,) checksums of betas before z-scoring; 0 where an earlier version packed it."""
        known = np.frombuffer(base64.b64decode(self.raw_base64), dtype="<u8")
        return known if self.raw_base64 else np.zeros(self.shard.samples, dtype="<u8")

    @property
    def rows(self) -> Table:
        """The shard's rows: ``TRIAL_ROW`` or ``PACKED_IMAGE_ROW``."""
        dtype = TRIAL_ROW if self.shard.kind == TRIALS else PACKED_IMAGE_ROW
        return np.frombuffer(base64.b64decode(self.rows_base64), dtype=dtype).copy()


def _base64(values: npt.NDArray[Any]) -> str:
    """Return an array's bytes as text."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def receipt_path(shards_dir: Path, shard_path: str) -> Path:
    """Return where the receipt of a shard lies; shards' basenames are unique."""
    return shards_dir / RECEIPTS_DIR / f"{PurePosixPath(shard_path).name}.json"


def write_receipt(shards_dir: Path, receipt: Receipt) -> None:
    """Write a receipt atomically; its shard must be complete."""
    write_json(receipt_path(shards_dir, receipt.shard.path), receipt.model_dump(mode="json"))


def is_whole(shards_dir: Path, shard: ShardInfo) -> bool:
    """Return whether a shard's file is there with its size; `nd verify` hashes it."""
    path = shards_dir / shard.path
    return path.is_file() and path.stat().st_size == shard.bytes


def read_receipts(shards_dir: Path) -> dict[str, Receipt]:
    """Return the receipts of a folder by their shard's path.

    Raises:
        DataError: one is damaged.
    """
    receipts = {}
    for path in sorted((shards_dir / RECEIPTS_DIR).glob("*.tar.json")):
        try:
            receipt = Receipt.model_validate(read_json(path))
        except (ValidationError, DataError) as error:
            raise DataError(
                "A receipt is damaged, or of another version of nd_dist.",
                where=str(path),
                found=differing_fields(error) if isinstance(error, ValidationError) else error.what,
                todo="delete it and run again: its shard will be repacked",
            ) from error
        receipts[receipt.shard.path] = receipt
    return receipts


def check_recipe(receipt: Receipt, recipe: Mapping[str, Any], where: Path, expected_rows: Table | None = None) -> None:
    """Refuse a shard of another recipe than is asked for now, because a folder must never mix two.

    Args:
        receipt: Of the shard.
        recipe: What it must have been made by, as far as that is given.
        where: The folder.
        expected_rows: Trial shards: the rows that it must have; what says where records lie is not looked at.

    Raises:
        DataError: names what differs.
    """
    old, new = receipt.recipe, dict(recipe)
    differing = sorted(key for key in new if old.get(key) != new[key])
    found = {key: old.get(key) for key in differing}
    if expected_rows is not None and not differing:
        rows = receipt.rows
        names = ("subject", "session", "trial", "image", "repeat", "split")
        if len(rows) != len(expected_rows) or any((rows[name] != expected_rows[name]).any() for name in names):
            new, found, differing = {"trials": _told(expected_rows)}, {"trials": _told(rows)}, ["trials"]
    if differing:
        raise DataError(
            "This folder holds a shard that was packed with other settings or from other data.",
            where=str(where / receipt.shard.path),
            expected=", ".join(f"{key}: {new[key]}" for key in differing),
            found=", ".join(f"{key}: {found[key]}" for key in differing),
            todo="choose another shards_dir, or delete this one",
        )


def _told(rows: Table) -> str:
    """Return a session's trials for people."""
    images = ", ".join(str(image) for image in rows["image"][:4].tolist())
    return f"{len(rows)} from {int(rows['trial'][0]) if len(rows) else '-'} on, of images {images} .."


def remove_replaced(shards_dir: Path) -> None:
    """Remove damaged files that were set aside and have been packed again."""
    for path in shards_dir.rglob(f"*{DAMAGED_SUFFIX}"):
        if path.with_suffix("").exists():
            path.unlink()


def remove_abandoned_parts(shards_dir: Path) -> None:
    """Remove half-written files of packers of this host that no longer run, and of any host after a day."""
    owner = re.compile(rf"\.{re.escape(socket.gethostname())}-(\d+)-\d+{re.escape(PART_SUFFIX)}$")
    for path in shards_dir.rglob(f"*{PART_SUFFIX}"):
        match = owner.search(path.name)
        is_dead = match is not None and not is_running(int(match[1]))
        try:
            if is_dead or time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # its writer finished or removed it meanwhile
            continue
