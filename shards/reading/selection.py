"""What a stream is asked for, and which items of which subjects that means. Pure, but for reading tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from nd_dist.errors import ConfigError, DataError
from shards.format.codec import PICTURES, image_key, stores_of
from shards.format.splits import is_heldout
from shards.format.tables import ABSENT, TEST, TRAIN, Table
from shards.reading.reader import ShardReader

StreamSplit = Literal["train", "heldout", "test"]


@dataclass(frozen=True)
class StreamConfig:
    """What a stream delivers.

    Args:
        subjects: Subjects in every batch, in batch order.
        targets: Target stores to read.
        samples_per_subject: Items of each subject in a global step.
        seed: Seed of the order.
        rank, world_size: Which share of every step this stream reads.
        split: ``train``, ``test``, or ``heldout`` (the share of the training images left out below).
        sessions: Only these sessions (none: all); one session is the "1 hour" setting.
        threads: Reader threads.
        heldout_fraction: Share of the training images that ``train`` leaves out for validation, by image, the same in
            every run.
        dtype: float32, or the dtype on disk; means over repeats and int8 stores are float32 in both cases.
        repeats: An item is one trial, or one image with the mean of the subject's trials of it (in ``sessions``).
        int8: Read the targets' int8 stores.
        pictures: Whether batches carry the pictures.
    """

    subjects: tuple[int, ...]
    targets: tuple[str, ...]
    samples_per_subject: int
    seed: int
    rank: int = 0
    world_size: int = 1
    split: StreamSplit = "train"
    sessions: tuple[int, ...] | None = None
    threads: int = 2
    heldout_fraction: float = 0.0
    dtype: Literal["float32", "stored"] = "float32"
    repeats: Literal["trials", "mean"] = "trials"
    int8: bool = False
    pictures: bool = False

    def __post_init__(self) -> None:
        """Refuse what no stream can deliver.

        Raises:
            ConfigError: says which value and why.
        """
        for is_right, expected, found in (
            (0 <= self.rank < self.world_size, "0 <= rank < world_size", f"rank {self.rank} of {self.world_size}"),
            (self.threads >= 1, "at least one thread", self.threads),
            (self.samples_per_subject >= 1, "at least one sample of a subject", self.samples_per_subject),
            (0 <= self.seed < 2**64, "a seed from 0 to 2**64 - 1", self.seed),
            (0.0 <= self.heldout_fraction <= 1.0, "a heldout_fraction from 0 to 1", self.heldout_fraction),
            (len(set(self.subjects)) == len(self.subjects) > 0, "subjects, each once", self.subjects),
            (len(set(self.targets)) == len(self.targets), "each target once", self.targets),
            (self.sessions is None or min(self.sessions, default=0) > 0, "sessions from 1 on, or None", self.sessions),
            (self.split in get_args(StreamSplit), f"one of {get_args(StreamSplit)}", self.split),
            (self.dtype in ("float32", "stored"), "float32 or stored", self.dtype),
            (self.repeats in ("trials", "mean"), "trials or mean", self.repeats),
        ):
            if not is_right:
                raise ConfigError("A stream cannot be asked for this.", expected=expected, found=found)

    @property
    def stores(self) -> tuple[str, ...]:
        """Stores of the targets, one each."""
        return stores_of(self.targets, self.int8)

    @property
    def all_stores(self) -> tuple[str, ...]:
        """Every store that is read, the pictures' too."""
        return (*self.stores, PICTURES) if self.pictures else self.stores


@dataclass(frozen=True)
class Items:
    """What a stream draws from one subject: single trials, or images with all their trials.

    Args:
        rows: (R,) positions in the table of trials, item by item.
        starts: (n + 1,) where each item begins in ``rows``, and the end.
    """

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of items n."""
        return len(self.starts) - 1

    def take(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the rows (r,) of some items (b,), item by item, and where each begins among them (b,)."""
        counts = self.starts[positions + 1] - self.starts[positions]
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        return self.rows[np.repeat(self.starts[positions], counts) + within], starts


def choose_items(trials: Table, config: StreamConfig, same_N: npt.NDArray[np.int64]) -> dict[int, Items]:
    """Return subject -> the items that a stream draws from.

    Args:
        trials: The table of trials.
        config: What is asked for.
        same_N: (num_images,) the first of the images that show the same; they are held out together.
    """
    is_chosen = trials["split"] == (TEST if config.split == "test" else TRAIN)
    if config.split != "test":
        heldout = is_heldout(same_N[trials["image"]], config.heldout_fraction)
        is_chosen &= heldout if config.split == "heldout" else ~heldout
    if config.sessions is not None:
        is_chosen &= np.isin(trials["session"], config.sessions)
    items = {}
    for subject in config.subjects:
        rows = np.flatnonzero(is_chosen & (trials["subject"] == subject))
        if config.repeats == "trials":
            items[subject] = Items(rows, np.arange(len(rows) + 1))
        else:
            rows = rows[np.argsort(trials["image"][rows], kind="stable")]
            _, starts = np.unique(trials["image"][rows], return_index=True)
            items[subject] = Items(rows, np.append(starts, len(rows)))
    return items


def check_stores(reader: ShardReader, config: StreamConfig, items: Mapping[int, Items]) -> None:
    """Refuse targets and pictures that lack an image which the stream will ask for.

    Raises:
        ConfigError: pictures were asked for as a target.
        DataError: with the first such image.
    """
    if PICTURES in config.targets:
        raise ConfigError(
            "Pictures are no target of a stream.",
            where="targets",
            found=list(config.targets),
            todo="set pictures=True",
        )
    rows = np.concatenate([part.rows for part in items.values()])
    image_ids = np.unique(reader.trials["image"][rows])
    for name in config.all_stores:
        absent = image_ids[reader.store(name)["shard"][image_ids] == ABSENT]
        if len(absent):
            raise DataError(
                f"Store {name!r} lacks images of the chosen trials.",
                where=reader.index.place,
                found=f"{len(absent)} images, e.g. {image_key(int(absent[0]))}",
                todo="set data.pictures=all and run `nd pack` again" if name == PICTURES else "run `nd pack` again",
            )
