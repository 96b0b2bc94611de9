"""An endless, exactly resumable stream of training batches, identical on any number of ranks and threads.

What a step holds follows from ``shards.order`` alone; threads read whole steps by position ahead of the consumer, who
gets them in order. The state is one integer: the next step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.schema import Batch
from nd_dist.seeds import splitmix64
from shards.buffers import BufferPool
from shards.codec import PICTURES, image_key
from shards.order import Order, SubjectSlice
from shards.reader import ShardReader
from shards.tables import ABSENT, TEST, TRAIN, Table

StreamSplit = Literal["train", "heldout", "test"]
_HELDOUT_KEY = 0x6E642D68656C646F  # a constant: all runs hold out the same images


@dataclass(frozen=True)
class StreamConfig:
    """What a stream delivers.

    Args:
        subjects: Subjects in every batch, in batch order.
        targets: Target stores to read.
        samples_per_subject: Trials of each subject in a global step; a multiple of ``world_size``.
        seed: Seed of the order.
        rank, world_size: Which share of every step this stream reads.
        split: ``train``, ``test`` (shared images), or ``heldout`` (the share of the training images left out below).
        sessions: Only these sessions (none: all); one session is the "1 hour" setting.
        threads: Reader threads.
        heldout_fraction: Share of the training images that ``train`` leaves out for validation, by image, the same in
            every run.
        dtype: float32, or the stored dtype.
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


def is_heldout(image_ids: npt.NDArray[np.integer[Any]], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which training images are held out for validation: a fixed share, chosen by image id alone."""
    keys = splitmix64(splitmix64(image_ids.astype(np.uint64)) ^ np.uint64(_HELDOUT_KEY))
    return np.asarray(keys.astype(np.float64) < fraction * 2.0**64)


class TrialStream:
    """Iterates over ``schema.Batch``, without an end; close it, or use it in a ``with`` block.

    Args:
        reader: The shards.
        config: What to deliver.

    Raises:
        ConfigError: the ranks do not divide the quota, or a subject has no trial in the split.
        DataError: a subject or target was not packed.
    """

    def __init__(self, reader: ShardReader, config: StreamConfig) -> None:
        if not 0 <= config.rank < config.world_size or config.threads < 1:
            raise ConfigError(
                "A stream needs 0 <= rank < world_size and at least one thread.",
                found=f"rank {config.rank} of {config.world_size}, {config.threads} threads",
            )
        self._reader, self._config = reader, config
        self._rows = _choose_rows(reader, config)
        self._order = Order(
            seed=config.seed,
            subjects=config.subjects,
            lengths=tuple(len(self._rows[subject]) for subject in config.subjects),
            quotas=(config.samples_per_subject,) * len(config.subjects),
        )
        self._order.check_world(config.world_size)
        _check_stores(reader, config, self._rows)
        self._content_id = reader.index.content_id(config.subjects, config.targets)
        self._pool = BufferPool()
        self._executor = ThreadPoolExecutor(config.threads, thread_name_prefix="trial-stream")
        self._step = 0
        self._ahead: deque[Future[Batch]] = deque()
        self._is_closed = False

    @property
    def step(self) -> int:
        """The step that ``next`` delivers."""
        return self._step

    @property
    def num_trials(self) -> dict[int, int]:
        """Subject -> trials in one pass."""
        return dict(zip(self._order.subjects, self._order.lengths, strict=True))

    def __iter__(self) -> Iterator[Batch]:
        """Return the stream itself: it goes on from where it is."""
        return self

    def __next__(self) -> Batch:
        """Return this rank's share of the next step.

        Raises:
            DataError: a sample cannot be read; asking again tries the same step again.
        """
        if self._is_closed:
            raise StopIteration
        started = time.perf_counter()
        while len(self._ahead) <= self._config.threads:
            self._ahead.append(self._executor.submit(self._read_step, self._step + len(self._ahead)))
        try:
            batch = self._ahead.popleft().result()
        except DataError:
            self._forget_ahead()
            raise
        self._step = batch.step + 1
        return replace(batch, data_wait_s=time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return where the stream is: JSON, the same on every rank."""
        config = self._config
        return {
            "content": self._content_id,
            "seed": config.seed,
            "step": self._step,
            "subjects": list(config.subjects),
            "num_trials": list(self._order.lengths),
            "quotas": list(self._order.quotas),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, of any world size and number of threads.

        Raises:
            CheckpointError: the state belongs to other shards, another seed, or another choice of trials.
        """
        own = self.state_dict()
        differing = [key for key in own if key != "step" and state.get(key) != own[key]]
        if differing:
            raise CheckpointError(
                "The data of this run is not the data of the checkpoint.",
                where=", ".join(differing),
                expected={key: state.get(key) for key in differing},
                found={key: own[key] for key in differing},
                todo="use the shards and settings that the checkpoint was trained with, or start a new run",
            )
        self._forget_ahead()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stop the reader threads; the stream ends."""
        self._is_closed = True
        self._forget_ahead()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrialStream:
        """Return the stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()

    def _forget_ahead(self) -> None:
        """Drop what was read ahead."""
        while self._ahead:
            self._ahead.pop().cancel()

    def _read_step(self, step: int) -> Batch:
        """Read one step's share (runs in a reader thread)."""
        config, reader = self._config, self._reader
        slices = self._order.slices(step, config.rank, config.world_size)
        voxels, parts = {}, []
        for part in slices:
            rows = reader.trials[self._rows[part.subject][part.positions]]
            voxels[part.subject] = self._read_voxels(rows, reader.num_voxels[part.subject])
            parts.append(rows)
        rows = np.concatenate(parts)
        image_ids = rows["image"].tolist()
        return Batch(
            step=step,
            voxels=voxels,
            targets={name: self._read_targets(name, image_ids) for name in config.targets},
            subject=rows["subject"].astype(np.int64),
            session=rows["session"].astype(np.int64),
            trial=rows["trial"].astype(np.int64),
            image_id=rows["image"].astype(np.int64),
            repeat=rows["repeat"].astype(np.int64),
            sample_id=_sample_ids(slices),
        )

    def _read_voxels(self, rows: Table, num_voxels: int) -> torch.Tensor:
        """Return the voxels (b, V) of rows of the table of trials."""
        stored_BV = self._pool.lend((len(rows), num_voxels), self._reader.index.voxels.dtype)
        self._reader.read_voxels(rows, stored_BV)
        return self._deliver(stored_BV)

    def _read_targets(self, name: str, image_ids: Sequence[int]) -> torch.Tensor:
        """Return a target (B, *shape) of images."""
        info = self._reader.index.features[name]
        stored = self._pool.lend((len(image_ids), *info.shape), info.dtype)
        self._reader.read_targets(name, image_ids, stored)
        return self._deliver(stored)

    def _deliver(self, stored: npt.NDArray[np.floating]) -> torch.Tensor:
        """Return a tensor in the wanted dtype; its memory returns to the pool when the last view of it is gone."""
        if self._config.dtype == "stored" or stored.dtype == np.float32:
            return torch.from_numpy(stored)
        wide = torch.from_numpy(self._pool.lend(stored.shape, np.float32))
        return wide.copy_(torch.from_numpy(stored))  # torch converts half precision several times faster than NumPy


def _choose_rows(reader: ShardReader, config: StreamConfig) -> dict[int, npt.NDArray[np.int64]]:
    """Return subject -> positions in the table of trials that the stream draws from."""
    trials = reader.trials
    is_chosen = trials["split"] == (TEST if config.split == "test" else TRAIN)
    if config.split != "test":
        heldout = is_heldout(trials["image"], config.heldout_fraction)
        is_chosen &= heldout if config.split == "heldout" else ~heldout
    if config.sessions is not None:
        is_chosen &= np.isin(trials["session"], config.sessions)
    return {subject: np.flatnonzero(is_chosen & (trials["subject"] == subject)) for subject in config.subjects}


def _check_stores(reader: ShardReader, config: StreamConfig, rows: Mapping[int, npt.NDArray[np.int64]]) -> None:
    """Refuse targets that lack an image which the stream will ask for.

    Raises:
        ConfigError: pictures were asked for.
        DataError: with the first such image.
    """
    if PICTURES in config.targets:
        raise ConfigError("Pictures are no target of a stream.", where="targets", found=list(config.targets))
    image_ids = np.unique(reader.trials["image"][np.concatenate(list(rows.values()))])
    for name in config.targets:
        absent = image_ids[reader.store(name)["shard"][image_ids] == ABSENT]
        if len(absent):
            raise DataError(
                f"Target {name!r} lacks images of the chosen trials.",
                where=str(reader.index.folder),
                found=f"{len(absent)} images, e.g. {image_key(int(absent[0]))}",
                todo="run `nd pack` again",
            )


def _sample_ids(slices: Sequence[SubjectSlice]) -> npt.NDArray[np.int64]:
    """Return the positions of a rank's rows in the global batch."""
    return np.concatenate([part.sample_ids for part in slices])
