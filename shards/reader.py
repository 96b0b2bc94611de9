"""Random access to packed samples by subject and image: for evaluation, baselines and users' own code.

Shape suffixes: N images, V voxels of one subject, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from nd_dist.schema import Split
from shards.codec import PICTURES, decode_png, image_key, trial_key
from shards.index import Index
from shards.records import ShardFiles
from shards.tables import ABSENT, TEST, TRAIN, Table


class ShardReader:
    """The shards of a folder; cheap to make, thread-safe to use.

    Args:
        shards_dir: Folder that ``nd pack`` wrote.

    Raises:
        DataError: the folder has no valid index.
    """

    def __init__(self, shards_dir: Path) -> None:
        self.index = Index.read(shards_dir)
        self.files = ShardFiles(shards_dir, self.index.shards)

    @property
    def num_voxels(self) -> dict[int, int]:
        """Subject -> voxels of its ROI."""
        return self.index.num_voxels

    @property
    def trials(self) -> Table:
        """The table of all trials (``tables.TRIAL_ROW``), by subject and trial."""
        return self.index.trials

    def store(self, name: str) -> Table:
        """Return the table of a store (``tables.IMAGE_ROW``), one row an image id.

        Raises:
            DataError: the store was not packed.
        """
        return self.index.table(name)

    def images(self, subject: int, split: Split) -> list[int]:
        """Return the ascending ids of the images that a subject saw, of one split.

        Raises:
            DataError: the subject was not packed.
        """
        rows = self._rows_of(subject)
        is_chosen = rows["split"] == (TEST if split == "test" else TRAIN)
        return [int(image_id) for image_id in np.unique(rows["image"][is_chosen])]

    def voxels(self, subject: int, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return z-scored betas (N, V), the mean over the repeats that the subject had of every image.

        Raises:
            DataError: the subject did not see an image, or a shard is damaged.
        """
        rows = self._rows_of(subject)
        by_image = _group_by_image(rows)
        info, num_voxels = self.index.voxels, self.index.subjects[subject].voxels
        record_V = np.empty(num_voxels, dtype=info.dtype)
        means_NV = np.empty((len(image_ids), num_voxels), dtype=np.float32)
        for position, image_id in enumerate(image_ids):
            if image_id not in by_image:
                raise DataError(f"Subject {subject} did not see image {image_id}.", where=str(self.index.folder))
            total_V = np.zeros(num_voxels, dtype=np.float64)
            for row in by_image[image_id]:
                self.read_voxels(row, record_V)
                total_V += record_V
            means_NV[position] = total_V / len(by_image[image_id])
        return means_NV

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target (N, *shape) of images, float32.

        Raises:
            DataError: the target or an image was not packed, or a shard is damaged.
        """
        info = self.index.feature(name)
        record = np.empty(info.shape, dtype=info.dtype)
        values = np.empty((len(image_ids), *info.shape), dtype=np.float32)
        for position, image_id in enumerate(image_ids):
            self.read_target(name, image_id, record)
            values[position] = record
        return values

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255.

        Raises:
            DataError: pictures or an image were not packed, or a shard is damaged.
        """
        info = self.index.feature(PICTURES)
        pictures_NHWC = np.empty((len(image_ids), *info.shape), dtype=np.uint8)
        for position, image_id in enumerate(image_ids):
            pictures_NHWC[position] = decode_png(self._read_png(image_id), where=image_key(image_id))
        return pictures_NHWC

    def _read_png(self, image_id: int) -> bytes:
        """Return the PNG bytes of an image."""
        row = self._image_row(PICTURES, image_id)
        shard, offset, num_bytes, crc = (int(row[name]) for name in ("shard", "offset", "bytes", "crc"))
        return self.files.read(shard, offset, num_bytes, crc, lambda: image_key(image_id))

    def read_voxels(self, row: np.void, out: npt.NDArray[np.floating]) -> None:
        """Fill ``out`` (V,), of the stored dtype, with the voxels of a row of ``trials``."""
        self.files.read_into(int(row["shard"]), int(row["offset"]), int(row["crc"]), out, lambda: trial_row_key(row))

    def read_target(self, name: str, image_id: int, out: npt.NDArray[np.floating]) -> None:
        """Fill ``out`` (*shape), of the stored dtype, with a target of an image."""
        row = self._image_row(name, image_id)
        self.files.read_into(
            int(row["shard"]), int(row["offset"]), int(row["crc"]), out, lambda: f"{image_key(image_id)}.{name}"
        )

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def _rows_of(self, subject: int) -> Table:
        """Return a subject's trials.

        Raises:
            DataError: the subject was not packed.
        """
        if subject not in self.index.subjects:
            raise DataError(
                f"Subject {subject} was not packed.",
                where=str(self.index.folder),
                expected=sorted(self.index.subjects),
                todo="add it to data.subjects and pack into a new folder",
            )
        return np.asarray(self.trials[self.trials["subject"] == subject])

    def _image_row(self, store: str, image_id: int) -> np.void:
        """Return an image's row in a store.

        Raises:
            DataError: the store lacks the image.
        """
        table = self.store(store)
        if not 0 <= image_id < len(table) or table["shard"][image_id] == ABSENT:
            raise DataError(f"Store {store!r} holds no image {image_id}.", where=str(self.index.folder))
        row: np.void = table[image_id]
        return row


def _group_by_image(rows: Table) -> Mapping[int, Table]:
    """Return image id -> its trials, in order."""
    order = np.argsort(rows["image"], kind="stable")
    ids, starts = np.unique(rows["image"][order], return_index=True)
    return dict(zip(ids.tolist(), np.split(rows[order], starts[1:]), strict=True))


def trial_row_key(row: np.void) -> str:
    """Return the sample key of a row of trials."""
    return trial_key(*(int(row[name]) for name in ("subject", "session", "trial", "image", "repeat")))
