"""An endless, exactly resumable stream of training batches, identical on any number of ranks and threads.

What a step holds follows from ``shards.reading.order`` alone; threads read whole steps by position ahead of the
consumer, who gets them in order. The state is the next step, and a hash of the chosen trials.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.schema import Batch
from shards.format.index import ShardInfo
from shards.format.splits import representatives
from shards.format.tables import Table
from shards.places.remote import Prefetcher
from shards.reading.buffers import BufferPool, page_locked
from shards.reading.order import Order, SubjectSlice
from shards.reading.reader import ShardReader, mean_items
from shards.reading.selection import StreamConfig, check_stores, choose_items

__all__ = ["StreamConfig", "TrialStream"]


class TrialStream(IterableDataset[Batch]):
    """Iterates over ``schema.Batch``, without an end; close it, or use it in a ``with`` block.

    A ``DataLoader`` or ``webdataset.WebLoader`` takes it with ``batch_size=None, num_workers=0``: it makes batches and
    reads ahead itself. A forked or spawned process goes on from the step at which it got the stream.

    Args:
        reader: The shards.
        config: What to deliver.

    Raises:
        ConfigError: a subject has no trial in the split.
        DataError: a subject or target was not packed.
    """

    def __init__(self, reader: ShardReader, config: StreamConfig) -> None:
        self._reader, self._config = reader, config
        self._items = choose_items(reader.trials, config, representatives(reader.index))
        self._order = Order(
            seed=config.seed,
            subjects=config.subjects,
            lengths=tuple(len(self._items[subject]) for subject in config.subjects),
            quotas=(config.samples_per_subject,) * len(config.subjects),
        )
        check_stores(reader, config, self._items)
        chosen = np.concatenate([self._items[subject].rows for subject in config.subjects])
        self._trials_id = reader.index.rows_id(reader.trials[chosen], config.all_stores)
        self._step = 0
        self._is_closed = False
        self._begin(BufferPool(page_locked) if torch.cuda.is_available() else BufferPool())

    def _begin(self, pool: BufferPool) -> None:
        """Make what reads ahead, in this process."""
        self._pool, self._process = pool, os.getpid()
        self._executor = ThreadPoolExecutor(self._config.threads, thread_name_prefix="trial-stream")
        self._ahead: deque[Future[Batch]] = deque()
        self._prefetcher: Prefetcher | None = None
        self._announced_until = 0

    def __reduce__(self) -> tuple[Any, ...]:  # Any: pickle's protocol
        """Let another process go on from the same step with threads of its own."""
        return _at_step, (self._reader, self._config, self._step)

    @property
    def step(self) -> int:
        """The step that ``next`` delivers."""
        return self._step

    @property
    def num_items(self) -> dict[int, int]:
        """Subject -> items (trials, or images with the mean of their trials) in one pass."""
        return dict(zip(self._order.subjects, self._order.lengths, strict=True))

    @property
    def steps_per_pass(self) -> int:
        """Steps after which every subject's items were visited at least once."""
        return max(-(-n // q) for n, q in zip(self._order.lengths, self._order.quotas, strict=True))

    def __iter__(self) -> Iterator[Batch]:
        """Return the stream itself: it goes on from where it is.

        Raises:
            ConfigError: a worker process of a DataLoader asks: each would deliver every batch.
        """
        if (worker := get_worker_info()) is not None:
            raise ConfigError(
                "A stream cannot be shared by the worker processes of a DataLoader: each would deliver every batch.",
                where="TrialStream",
                expected="num_workers=0; the stream reads ahead itself, in StreamConfig.threads threads",
                found=f"num_workers={worker.num_workers}",
            )
        return self

    def __next__(self) -> Batch:
        """Return this rank's share of the next step.

        Raises:
            DataError: a sample cannot be read; asking again tries the same step again.
        """
        if self._is_closed:
            raise StopIteration
        started = time.perf_counter()
        if self._process != os.getpid():  # forked: threads and locks stayed behind
            self._reader = ShardReader.over(self._reader.index)
            self._begin(BufferPool())
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._reader.index.store, self._shards_by_first_use(self._step))
            self._announced_until = self._step + self.steps_per_pass  # later passes find the records in memory
        while len(self._ahead) <= self._config.threads:
            self._ahead.append(self._executor.submit(self._read_step, self._step + len(self._ahead)))
        with ExitStack() as undone:  # after an error, ctrl-C too, the next call begins with the same step
            undone.callback(self._forget_ahead)
            batch = self._ahead.popleft().result()
            undone.pop_all()
        self._step = batch.step + 1
        return replace(batch, data_wait_s=time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return where the stream is: JSON, the same on every rank."""
        config = self._config
        return {
            "trials": self._trials_id,
            "seed": config.seed,
            "step": self._step,
            "subjects": list(config.subjects),
            "num_items": list(self._order.lengths),
            "repeats": config.repeats,
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
        if self._process != os.getpid():
            return
        self._forget_ahead()
        if self._prefetcher is not None:
            self._prefetcher.close()
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

    def _rows(self, part: SubjectSlice) -> tuple[Table, npt.NDArray[np.int64]]:
        """Return the rows of trials that a slice reads, and where each of its items begins among them."""
        positions, starts = self._items[part.subject].take(part.positions)
        return self._reader.trials[positions], starts

    def _shards_by_first_use(self, first_step: int) -> Iterator[ShardInfo]:
        """Yield the shards that this rank needs in one pass over the longest subject, each once, in order of use."""
        config, index = self._config, self._reader.index
        tables = [index.table(name) for name in config.all_stores]
        seen: set[int] = set()
        for step in range(first_step, first_step + self.steps_per_pass):
            for part in self._order.slices(step, config.rank, config.world_size):
                rows, _ = self._rows(part)
                for shards in (rows["shard"], *(table["shard"][rows["image"]] for table in tables)):
                    for number in dict.fromkeys(shards.tolist()):
                        if number not in seen:
                            seen.add(number)
                            yield index.shards[number]

    def _read_step(self, step: int) -> Batch:
        """Read one step's share (runs in a reader thread)."""
        config = self._config
        slices = self._order.slices(step, config.rank, config.world_size)
        chosen = {part.subject: self._rows(part) for part in slices}
        rows = np.concatenate([rows[starts] for rows, starts in chosen.values()])
        image_ids = rows["image"].tolist()
        if step < self._announced_until:
            for subject, (subject_rows, _) in chosen.items():
                self._reader.announce_voxels(subject, subject_rows)
            for store in config.stores:
                self._reader.announce_targets(store, image_ids)
        return Batch(
            step=step,
            voxels={subject: self._read_voxels(subject, *items) for subject, items in chosen.items()},
            targets={
                name: self._read_target(store, image_ids)
                for name, store in zip(config.targets, config.stores, strict=True)
            },
            subject=rows["subject"].astype(np.int64),
            session=rows["session"].astype(np.int64),
            trial=rows["trial"].astype(np.int64),
            image_id=rows["image"].astype(np.int64),
            repeat=rows["repeat"].astype(np.int64),
            sample_id=np.concatenate([part.sample_ids for part in slices]),
            pictures=torch.from_numpy(self._reader.pictures(image_ids)) if config.pictures else None,
        )

    def _read_voxels(self, subject: int, rows: Table, starts: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the voxels (b, V) of b items, each the mean over its rows of the table of trials."""
        num_voxels, dtype = self._reader.num_voxels[subject], self._reader.index.voxels.dtype
        if self._config.repeats == "trials":
            stored_BV = self._pool.lend((len(rows), num_voxels), dtype)
            self._reader.read_voxels(rows, stored_BV)
            return self._deliver(stored_BV)
        stored_RV = np.empty((len(rows), num_voxels), dtype)  # R differs by step: the pool would hold one of each
        self._reader.read_voxels(rows, stored_RV)
        means_BV = self._pool.lend((len(starts), num_voxels), np.float32)
        mean_items(stored_RV, starts, means_BV)
        return torch.from_numpy(means_BV)

    def _read_target(self, store: str, image_ids: Sequence[int]) -> torch.Tensor:
        """Return a target (B, *shape) of B images; that of an int8 store is scaled."""
        info = self._reader.index.features[store]
        stored = self._pool.lend((len(image_ids), *info.shape), info.dtype)
        self._reader.read_targets(store, image_ids, stored)
        if info.scale is None:
            return self._deliver(stored)
        wide = torch.from_numpy(self._pool.lend(stored.shape, np.float32))
        return torch.mul(torch.from_numpy(stored), torch.from_numpy(self._reader.index.scale(store)), out=wide)

    def _deliver(self, stored: npt.NDArray[np.floating]) -> torch.Tensor:
        """Return a tensor in the wanted dtype; its memory returns to the pool when the last view of it is gone."""
        if self._config.dtype == "stored" or stored.dtype == np.float32:
            return torch.from_numpy(stored)
        wide = torch.from_numpy(self._pool.lend(stored.shape, np.float32))
        return wide.copy_(torch.from_numpy(stored))  # torch converts half precision several times faster than NumPy


def _at_step(reader: ShardReader, config: StreamConfig, step: int) -> TrialStream:
    """Return a stream that goes on from a step."""
    stream = TrialStream(reader, config)
    stream.load_state_dict({**stream.state_dict(), "step": step})
    return stream
