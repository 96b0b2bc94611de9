"""Reads single records of shards by position, from any number of threads, and refuses wrong bytes.

A record is checked against its checksum on every read, so a flipped byte, a cut or exchanged file and a wrong offset
are errors that name shard, sample and offset, and never a wrong sample.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.format.checksum import checksum
from shards.format.index import ShardInfo
from shards.format.tables import Table
from shards.places.store import Store
from shards.reading.buffers import BufferPool
from shards.reading.helpers import Helper, Task
from shards.reading.open_files import max_open_shards

NOTE_USE_S = 30.0
_PAGE_BYTES = 4096
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """Records to be read.

    Args:
        rows: (N,) of a table, with columns shard, offset and checksum.
        records: N C-contiguous arrays (or one array of N records), overwritten.
        name: Names the sample at a position; called only where reading fails.
    """

    rows: Table
    records: npt.NDArray[np.floating] | Sequence[npt.NDArray[np.uint8]]
    name: Callable[[int], str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all records."""
        return self.records.nbytes if isinstance(self.records, np.ndarray) else sum(r.nbytes for r in self.records)

    @property
    def record_bytes(self) -> int:
        """Bytes of each of N records that are one array."""
        return self.num_bytes // max(1, len(self.records))

    def contents(self) -> list[memoryview]:
        """Return the memory of every record."""
        if not isinstance(self.records, np.ndarray):
            return [record.data for record in self.records]
        memory = self.records.reshape(-1).view(np.uint8).data
        num_bytes = self.record_bytes
        return [memory[start : start + num_bytes] for start in range(0, len(memory), num_bytes or 1)]

    def places(self, pool: BufferPool) -> npt.NDArray[np.int64]:
        """Return where (N,) in a pool's file that memory is."""
        assert isinstance(self.records, np.ndarray)
        return pool.offset(self.records) + np.arange(len(self.records), dtype=np.int64) * self.record_bytes


@dataclass(frozen=True)
class Elsewhere:
    """A process that reads.

    Args:
        helper: The process.
        pool: The records are its memory.
        max_shards: Shards that may be in use at a time.
    """

    helper: Helper
    pool: BufferPool
    max_shards: int


@dataclass(frozen=True)
class _Rows:
    """The columns of what is wanted, all (N,)."""

    COLUMNS: ClassVar = ("shard", "offset", "checksum")
    shards: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]

    def take(self, part: npt.NDArray[np.int64]) -> _Rows:
        """Return some of them."""
        return _Rows(self.shards[part], self.offsets[part], self.checksums[part])


class _ReadBefore:
    """Remembers which records other processes read: by the page (4 KiB) of its shard that a record begins in."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        num_pages = np.array([-(-shard.bytes // _PAGE_BYTES) for shard in shards], dtype=np.int64)
        self._first_pages = np.cumsum(num_pages) - num_pages
        self._were_read = np.zeros(num_pages.sum(), dtype=np.bool_)

    def note(self, rows: _Rows) -> npt.NDArray[np.bool_]:
        """Return which (N,) records were read before, and remember them all."""
        pages = self._first_pages[rows.shards] + rows.offsets.astype(np.int64) // _PAGE_BYTES
        were_read: npt.NDArray[np.bool_] = self._were_read[pages]
        self._were_read[pages] = True
        return were_read

    def forget(self) -> None:
        """Begin anew."""
        self._were_read[:] = False


class _OpenFile:
    """A file descriptor that closes itself when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.num_bytes, self.identity = status.st_size, (status.st_dev, status.st_ino)
        self.noted = time.monotonic()

    def __del__(self) -> None:
        os.close(self.descriptor)

    def is_in_cache(self) -> bool:
        """Return whether a cached file still has its name, and note from time to time that it is used."""
        if os.fstat(self.descriptor).st_nlink == 0:
            return False
        if (now := time.monotonic()) - self.noted > NOTE_USE_S:
            os.utime(self.descriptor)
            self.noted = now
        return True


class _WrongBytes(Exception):
    """What is wrong with a record; becomes an error that names the sample."""


class ShardFiles:
    """The shards of an index, opened when first read.

    Args:
        store: Where they lie.
        shards: The index's list of shards.
        max_open: Files kept open (none: as many as the system allows); the least recently used is closed first, once
            no thread reads it.
    """

    def __init__(self, store: Store, shards: Sequence[ShardInfo], max_open: int | None = None) -> None:
        self._store, self._shards = store, shards
        self._max_open = max_open or max_open_shards()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._read_before = _ReadBefore(shards)
        self._was_told = False

    def read(self, wanted: Sequence[Wanted], elsewhere: Elsewhere | None = None) -> None:
        """Fill records with what rows of tables point to.

        Args:
            wanted: What to read.
            elsewhere: The process that reads, where it is not this one; all records are memory of its pool.

        Raises:
            DataError: a shard is missing or cut, or a record's bytes are not those that were packed.
        """
        if not wanted:
            return
        rows = _Rows(*(np.concatenate([part.rows[column] for part in wanted]) for column in _Rows.COLUMNS))
        is_right = np.zeros(len(rows.shards), dtype=np.bool_)
        if elsewhere is not None:
            places = np.concatenate([part.places(elsewhere.pool) for part in wanted])
            lengths = np.repeat([part.record_bytes for part in wanted], [len(part.rows) for part in wanted])
            for part in _split_by_shards(rows.shards, elsewhere.max_shards):
                is_right[part] = self._read_elsewhere(rows.take(part), places[part], lengths[part], elsewhere)
        if is_right.all():
            return
        contents = [content for part in wanted for content in part.contents()]
        for position in np.flatnonzero(~is_right).tolist():
            self._read_here(rows, position, contents[position], wanted)
        if elsewhere is not None and not elsewhere.helper.is_gone and not self._was_told:
            self._was_told = True
            _LOGGER.warning("A reader process cannot read what this process can: %d records.", np.sum(~is_right))

    def _read_elsewhere(
        self, rows: _Rows, places: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], elsewhere: Elsewhere
    ) -> npt.NDArray[np.bool_]:
        """Let another process fill records; return which (N,) are those that were packed."""
        numbers, which = np.unique(rows.shards, return_inverse=True)
        files = [self._file(shard) for shard in numbers.tolist()]  # held while they are read
        pool = elsewhere.pool
        task = Task(
            memory=(pool.identity, pool.descriptor, pool.num_bytes),
            shards=tuple((file.identity, file.descriptor) for file in files),
            which=which,
            offsets=rows.offsets,
            places=places,
            lengths=lengths,
            checksums=rows.checksums,
            were_read=self._read_before.note(rows),
        )
        answer = elsewhere.helper.read(task)
        if answer.is_missing:
            self._read_before.forget()
        return answer.is_right

    def _read_here(self, rows: _Rows, position: int, content: memoryview, wanted: Sequence[Wanted]) -> None:
        """Fill one record by itself; once more where another copy of its shard can be had.

        Raises:
            DataError: it cannot be had.
        """
        shard, offset, expected = (int(column[position]) for column in (rows.shards, rows.offsets, rows.checksums))
        try:
            self._read(shard, content, offset, expected)
        except _WrongBytes as error:
            if self._forget(shard):
                with suppress(_WrongBytes):
                    self._read(shard, content, offset, expected)
                    return
            place, name = f"{self._store.place}/{self._shards[shard].path}", _name(wanted, position)
            raise DataError(
                "A sample cannot be read.",
                where=f"{place}, sample {name}, offset {offset}",
                found=str(error),
                todo="run `nd verify --repair` on the folder that was packed",
            ) from error

    def announce(self, rows: Table, num_bytes: int) -> None:
        """Tell the operating system which records will be read next, so that a cold disk gets many requests at once.

        Args:
            rows: (N,) with columns shard and offset.
            num_bytes: Length of every record.

        Raises:
            DataError: a shard is missing or has another size.
        """
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for shard, offset in zip(rows["shard"].tolist(), rows["offset"].tolist(), strict=True):
            file = self._file(shard)
            os.posix_fadvise(file.descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files that no thread reads any more."""
        with self._lock:
            self._open.clear()

    def _read(self, shard: int, content: memoryview, offset: int, expected: int) -> None:
        """Fill one record.

        Raises:
            _WrongBytes: they are not those that were packed.
        """
        file = self._file(shard)  # held while it is read: another thread may drop it from the open ones
        _pread_full(file.descriptor, content, offset)
        if checksum(content) != expected:
            raise _WrongBytes("the bytes are not those that were packed (checksum differs)")

    def _forget(self, shard: int) -> bool:
        """Drop a shard that turned out wrong; return whether another copy can be had."""
        with self._lock:
            self._open.pop(shard, None)
        return self._store.discard(self._shards[shard])

    def _file(self, shard: int) -> _OpenFile:
        """Return an open shard whose size is the index's.

        Raises:
            DataError: it is missing or has another size.
        """
        with self._lock:
            if (known := self._open.get(shard)) is not None:
                if not self._store.is_remote or known.is_in_cache():
                    self._open.move_to_end(shard)
                    return known
                del self._open[shard]
        info = self._shards[shard]
        file = _OpenFile(self._store.open(info))
        if file.num_bytes != info.bytes:
            raise DataError(
                "A shard has another size than the index says.",
                where=f"{self._store.place}/{info.path}",
                expected=f"{info.bytes} bytes",
                found=f"{file.num_bytes} bytes",
                todo="run `nd verify --repair` on the folder that was packed",
            )
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file


def _split_by_shards(shards: npt.NDArray[np.uint32], at_most: int) -> list[npt.NDArray[np.int64]]:
    """Return the positions of records, in as few parts as lie in so many shards at most each."""
    order = np.argsort(shards, kind="stable")
    is_first = np.diff(shards[order], prepend=-1) != 0
    starts = np.flatnonzero(is_first)[at_most::at_most]
    return np.split(order, starts)


def _name(wanted: Sequence[Wanted], position: int) -> str:
    """Return the name of the sample at a position in all that is wanted."""
    for part in wanted:
        if position < len(part.rows):
            return part.name(position)
        position -= len(part.rows)
    raise IndexError(position)


def _pread_full(descriptor: int, content: memoryview, offset: int) -> None:
    """Fill ``content`` from a file's ``offset`` on; short reads are continued.

    Raises:
        _WrongBytes: the file ends early or cannot be read.
    """
    done = 0
    while done < len(content):
        try:
            count = os.preadv(descriptor, [content[done:]], offset + done)
        except OSError as error:
            raise _WrongBytes(f"read error: {error.strerror}") from error
        if count == 0:
            raise _WrongBytes(f"the file ends after {done} of {len(content)} bytes")
        done += count
