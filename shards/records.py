"""Reads single records of shards by position, from any number of threads, and refuses wrong bytes.

A record is checked against its checksum on every read, so a flipped byte, a cut or exchanged file and a wrong offset
are errors that name shard, sample and offset, and never a wrong sample.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.checksum import checksum
from shards.index import ShardInfo
from shards.scatter import MAX_READS, Places, ScatteredReads
from shards.store import Store
from shards.tables import Table

MAX_OPEN_FILES = 256
NOTE_USE_S = 30.0
TOGETHER_BYTES = 2 * 1024**2  # read in one call, then hashed while they still lie in the processor's cache
Records = npt.NDArray[np.floating] | Sequence[npt.NDArray[np.uint8]]


class _OpenFile:
    """A file descriptor that closes itself when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
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
        max_open: Files kept open; the least recently used is closed first, once no thread reads it.
    """

    _scattered = ScatteredReads()  # of the thread, whichever files it reads

    def __init__(self, store: Store, shards: Sequence[ShardInfo], max_open: int = MAX_OPEN_FILES) -> None:
        self._store, self._shards, self._max_open = store, shards, max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_rows(self, rows: Table, records: Records, name: Callable[[int], str]) -> None:
        """Fill records with what rows of a table point to.

        Args:
            rows: (N,) with columns shard, offset and checksum.
            records: N C-contiguous arrays (or one array of N records), overwritten.
            name: Names the sample at a position; called only where reading fails.

        Raises:
            DataError: a shard is missing or cut, or a record's bytes are not those that were packed.
        """
        contents = _as_bytes(records)
        is_right = np.zeros(len(rows), dtype=np.bool_)
        if isinstance(contents, np.ndarray) and len(rows):
            is_right = self._read_together(rows, contents)
        for position in np.flatnonzero(~is_right).tolist():
            content = contents[position]
            shard, offset, expected = (int(rows[column][position]) for column in ("shard", "offset", "checksum"))
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

    def _read_together(self, rows: Table, contents_NB: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Fill records (N, num_bytes) in few system calls; return which (N,) are those that were packed."""
        is_right = np.zeros(len(rows), dtype=np.bool_)
        shards = rows["shard"].tolist()
        files = {shard: self._file(shard) for shard in set(shards)}  # held while they are read, see _read
        num_bytes = contents_NB.shape[1]
        places = Places(
            descriptors=np.array([files[shard].descriptor for shard in shards], dtype=np.int64),
            offsets=rows["offset"],
            addresses=contents_NB.ctypes.data + np.arange(len(rows)) * num_bytes,
            num_bytes=num_bytes,
        )
        step = min(MAX_READS, max(1, TOGETHER_BYTES // num_bytes))
        for start, stop, is_whole in self._scattered.read(places, step):
            found = np.array([checksum(content) for content in contents_NB[start:stop]], dtype=np.uint64)
            is_right[start:stop] = is_whole & (found == rows["checksum"][start:stop])
        return is_right

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

    def _read(self, shard: int, content: npt.NDArray[np.uint8], offset: int, expected: int) -> None:
        """Fill one record.

        Raises:
            _WrongBytes: they are not those that were packed.
        """
        file = self._file(shard)  # held while it is read: another thread may drop it from the open ones
        _pread_full(file.descriptor, content.data, offset)
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
        if (size := os.fstat(file.descriptor).st_size) != info.bytes:
            raise DataError(
                "A shard has another size than the index says.",
                where=f"{self._store.place}/{info.path}",
                expected=f"{info.bytes} bytes",
                found=f"{size} bytes",
                todo="run `nd verify --repair` on the folder that was packed",
            )
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file


def _as_bytes(records: Records) -> Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]:
    """Return records as flat bytes that share their memory."""
    if isinstance(records, np.ndarray):
        return records.reshape(len(records), -1).view(np.uint8) if len(records) else records.view(np.uint8)
    return records


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
