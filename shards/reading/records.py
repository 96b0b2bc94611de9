"""Reads single records of shards by position, from any number of threads, and refuses wrong bytes.

A record is checked against its checksum on every read, so a flipped byte, a cut or exchanged file and a wrong offset
are errors that name shard, sample and offset, and never a wrong sample.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.format.codec import checksum
from shards.format.index import ShardInfo
from shards.format.tables import Table
from shards.places.store import Store

NOTE_USE_S = 30.0
MAX_OPEN_SHARDS = 4096  # eight subjects have some 1,500 shards
Records = npt.NDArray[np.floating] | Sequence[npt.NDArray[np.uint8]]


def max_open_shards() -> int:
    """Return how many shards may stay open: half of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(MAX_OPEN_SHARDS, soft // 2)


def allow_more_open_files() -> None:
    """Let this process and its children open as many files as shards ask for, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_OPEN_SHARDS if hard == resource.RLIM_INFINITY else min(2 * MAX_OPEN_SHARDS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _OpenFile:
    """A file descriptor that closes itself when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size
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
    """The shards of an index, opened when first read; of too many the least recently used is closed.

    Args:
        store: Where they lie.
        shards: The index's list of shards.
    """

    def __init__(self, store: Store, shards: Sequence[ShardInfo]) -> None:
        self._store, self._shards = store, shards
        self._max_open = max_open_shards()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, rows: Table, records: Records, name: Callable[[int], str]) -> None:
        """Fill records with what rows of a table point to.

        Args:
            rows: (N,) with columns shard, offset and checksum.
            records: N C-contiguous arrays (or one array of N records), overwritten.
            name: Names the sample at a position; called only where reading fails.

        Raises:
            DataError: a shard is missing or cut, or a record's bytes are not those that were packed.
        """
        columns = (rows[column].tolist() for column in ("shard", "offset", "checksum"))
        for position, (shard, offset, expected) in enumerate(zip(*columns, strict=True)):
            content = records[position].reshape(-1).view(np.uint8).data
            try:
                self._read(shard, content, offset, expected)
            except _WrongBytes as error:
                if self._forget(shard):
                    with suppress(_WrongBytes):
                        self._read(shard, content, offset, expected)
                        continue
                raise DataError(
                    "A sample cannot be read.",
                    where=f"{self._store.place}/{self._shards[shard].path}, sample {name(position)}, offset {offset}",
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
