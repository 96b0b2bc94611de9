"""Random access to packed samples by subject and image: for evaluation, baselines and users' own code.

Shape suffixes: N images, V voxels of one subject, H height, W width, C colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.config import RemoteConfig
from nd_dist.errors import DataError
from nd_dist.schema import Split, TwoRepeats
from shards.format.codec import PICTURES, decode_png, image_key, trial_key
from shards.format.index import Index
from shards.format.splits import is_heldout, representatives
from shards.format.tables import ABSENT, TEST, TRAIN, Table
from shards.reading.records import ShardFiles


class ShardReader:
    """The shards of a folder; cheap to make, thread-safe to use.

    Args:
        location: Folder that ``nd pack`` wrote, or a URL of a copy of it (http, https, s3).
        remote: Cache and server settings of a URL (default: those of ``RemoteConfig``).

    Raises:
        DataError: there is no valid index.
        ConfigError: the URL's protocol needs a package that is not installed.
    """

    def __init__(self, location: Path | str, remote: RemoteConfig | None = None) -> None:
        self._use(Index.read(location, remote))

    @classmethod
    def over(cls, index: Index) -> ShardReader:
        """Return a reader of the shards of an index that was read already."""
        reader = cls.__new__(cls)
        reader._use(index)
        return reader

    def _use(self, index: Index) -> None:
        self.index = index
        self.files = ShardFiles(index.store, index.shards)
        self._by_image: dict[tuple[int, tuple[int, ...] | None], Mapping[int, Table]] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # Any: pickle's protocol
        """Let another process open the same shards anew."""
        return ShardReader.over, (self.index,)

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

    def trials_of(self, subject: int, sessions: Sequence[int] | None = None) -> Table:
        """Return a subject's trials of some sessions (none: all).

        Raises:
            DataError: the subject was not packed.
        """
        if subject not in self.index.subjects:
            raise DataError(
                f"Subject {subject} was not packed.",
                where=self.index.place,
                expected=sorted(self.index.subjects),
                todo="add it to data.subjects and pack into a new folder",
            )
        rows = np.asarray(self.trials[self.trials["subject"] == subject])
        return rows if sessions is None else rows[np.isin(rows["session"], list(sessions))]

    def images(self, subject: int, split: Split, sessions: Sequence[int] | None = None) -> list[int]:
        """Return the ascending ids of the images that a subject saw, of one split (none: in any session).

        Raises:
            DataError: the subject was not packed.
        """
        rows = self.trials_of(subject, sessions)
        is_chosen = rows["split"] == (TEST if split == "test" else TRAIN)
        return [int(image_id) for image_id in np.unique(rows["image"][is_chosen])]

    def without_picture(self, subjects: Sequence[int], split: Split) -> list[int]:
        """Return the ascending ids of the images of subjects whose pictures were not packed.

        Raises:
            DataError: a subject was not packed.
        """
        ids = sorted({image_id for subject in subjects for image_id in self.images(subject, split)})
        if PICTURES not in self.index.features:
            return ids
        return [image_id for image_id in ids if self.store(PICTURES)["shard"][image_id] == ABSENT]

    def heldout_images(self, subject: int, fraction: float) -> list[int]:
        """Return the training images that ``StreamConfig.heldout_fraction`` leaves out, ascending.

        Raises:
            DataError: the subject was not packed.
        """
        image_ids = np.array(self.images(subject, "train"), dtype=np.int64)
        heldout: list[int] = image_ids[is_heldout(representatives(self.index)[image_ids], fraction)].tolist()
        return heldout

    def voxels(
        self,
        subject: int,
        image_ids: Sequence[int],
        sessions: Sequence[int] | None = None,
        *,
        two_repeats: TwoRepeats = "mean",
    ) -> npt.NDArray[np.float32]:
        """Return z-scored betas (N, V), the mean over the repeats that the subject had of every image.

        Two repeats a, b are averaged as ``two_repeats`` says: their mean, or (2 a + b) / 3 as the released code does.

        Raises:
            DataError: the subject did not see an image, or a shard is damaged.
        """
        return self.voxels_and_repeats(subject, image_ids, sessions, two_repeats=two_repeats)[0]

    def voxels_and_repeats(
        self,
        subject: int,
        image_ids: Sequence[int],
        sessions: Sequence[int] | None = None,
        *,
        two_repeats: TwoRepeats = "mean",
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Return ``voxels`` and how many trials each is the mean of.

        Raises:
            DataError: the subject did not see an image, or a shard is damaged.
        """
        by_image = self._trials_by_image(subject, None if sessions is None else tuple(sessions))
        if missing := [image_id for image_id in image_ids if image_id not in by_image]:
            raise DataError(f"Subject {subject} did not see image {missing[0]}.", where=self.index.place)
        num_voxels = self.index.subjects[subject].voxels
        means_NV = np.empty((len(image_ids), num_voxels), dtype=np.float32)
        for mean_1V, image_id in zip(means_NV[:, None], image_ids, strict=True):
            rows = by_image[image_id]
            if two_repeats == "official" and len(rows) == 2:
                rows = rows[[0, 1, 0]]
            repeats_RV = np.empty((len(rows), num_voxels), dtype=self.index.voxels.dtype)
            self.read_voxels(rows, repeats_RV)
            mean_items(repeats_RV, np.zeros(1, dtype=np.int64), mean_1V)
        return means_NV, [len(by_image[image_id]) for image_id in image_ids]

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target (N, *shape) of images, float32.

        Raises:
            DataError: the target or an image was not packed, or a shard is damaged.
        """
        info = self.index.feature(name)
        stored = np.empty((len(image_ids), *info.shape), dtype=info.dtype)
        self.read_targets(name, image_ids, stored)
        values = stored.astype(np.float32)
        return values if info.scale is None else values * self.index.scale(name)

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255.

        Raises:
            DataError: pictures or an image were not packed, or a shard is damaged.
        """
        info = self.index.feature(PICTURES)
        rows = self._image_rows(PICTURES, image_ids)
        contents = [np.empty(num_bytes, dtype=np.uint8) for num_bytes in rows["bytes"].tolist()]
        self.files.read(rows, contents, lambda position: image_key(image_ids[position]))
        pictures_NHWC = np.empty((len(image_ids), *info.shape), dtype=np.uint8)
        for picture_HWC, content, image_id in zip(pictures_NHWC, contents, image_ids, strict=True):
            picture_HWC[:] = decode_png(content.tobytes(), where=image_key(image_id))
        return pictures_NHWC

    def read_voxels(self, rows: Table, out_NV: npt.NDArray[np.floating]) -> None:
        """Fill ``out_NV`` (N, V), of the stored dtype, with the voxels of N rows of ``trials`` of one subject."""
        self.files.read(rows, out_NV, lambda position: trial_row_key(rows[position]))

    def read_targets(self, name: str, image_ids: Sequence[int], out: npt.NDArray[np.floating]) -> None:
        """Fill ``out`` (N, *shape), of the stored dtype, with a target of N images."""
        rows = self._image_rows(name, image_ids)
        self.files.read(rows, out, lambda position: f"{image_key(int(image_ids[position]))}.{name}")

    def announce_voxels(self, subject: int, rows: Table) -> None:
        """Say that rows of ``trials`` of a subject will be read next."""
        self.files.announce(rows, self.num_voxels[subject] * np.dtype(self.index.voxels.dtype).itemsize)

    def announce_targets(self, name: str, image_ids: Sequence[int]) -> None:
        """Say that a target of images will be read next."""
        info = self.index.feature(name)
        self.files.announce(self._image_rows(name, image_ids), prod(info.shape) * np.dtype(info.dtype).itemsize)

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def _trials_by_image(self, subject: int, sessions: tuple[int, ...] | None) -> Mapping[int, Table]:
        """Return image id -> a subject's trials of it; computed once a subject and choice of sessions."""
        key = (subject, sessions)
        if key not in self._by_image:
            self._by_image[key] = _group_by_image(self.trials_of(subject, sessions))
        return self._by_image[key]

    def _image_rows(self, store: str, image_ids: Sequence[int]) -> Table:
        """Return the rows of images in a store.

        Raises:
            DataError: the store lacks an image.
        """
        table = self.store(store)
        ids = np.asarray(image_ids, dtype=np.int64)
        is_inside = (ids >= 0) & (ids < len(table))
        rows = np.asarray(table[np.where(is_inside, ids, 0)])
        is_present = is_inside & (rows["shard"] != ABSENT)
        if not is_present.all():
            absent = int(ids[~is_present][0])
            raise DataError(f"Store {store!r} holds no image {absent}.", where=self.index.place)
        return rows


def mean_items(
    records_RV: npt.NDArray[np.floating], starts: npt.NDArray[np.int64], out_BV: npt.NDArray[np.floating]
) -> None:
    """Fill ``out_BV`` (B, V) with the means of consecutive records (R, V); item b begins at record ``starts[b]``."""
    counts = np.diff(np.append(starts, len(records_RV)))
    sums_BV = np.add.reduceat(records_RV, starts, axis=0, dtype=np.float64)
    np.divide(sums_BV, counts[:, None], out=out_BV, casting="same_kind")


def _group_by_image(rows: Table) -> Mapping[int, Table]:
    """Return image id -> its trials, in order."""
    order = np.argsort(rows["image"], kind="stable")
    ids, starts = np.unique(rows["image"][order], return_index=True)
    return dict(zip(ids.tolist(), np.split(rows[order], starts[1:]), strict=True))


def trial_row_key(row: np.void) -> str:
    """Return the sample key of a row of trials."""
    return trial_key(*(int(row[name]) for name in ("subject", "session", "trial", "image", "repeat")))
