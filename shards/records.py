"""Reads single records of shards by position, from any number of threads, and refuses wrong bytes.

A record is checked against its crc32, so a flipped byte, a cut or exchanged file and a wrong offset are errors that
name shard, sample and offset, and never a wrong sample.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.index import ShardInfo

MAX_OPEN_FILES = 256


class _OpenFile:
    """A file descriptor that closes itself when its last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardFiles:
    """The shards of an index, opened when first read.

    Args:
        folder: Folder of the shards.
        shards: The index's list of shards.
        max_open: Files kept open; the least recently used is closed first, once no thread reads it.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardInfo], max_open: int = MAX_OPEN_FILES) -> None:
        self._folder, self._shards, self._max_open = folder, shards, max_open
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(
        self, shard: int, offset: int, crc: int, out: npt.NDArray[np.generic], sample: Callable[[], str]
    ) -> None:
        """Fill ``out`` (C-contiguous) with the record at ``offset``.

        Args:
            shard: Position in the list of shards.
            offset: Of the record's first byte.
            crc: Expected crc32 of the record.
            out: Its bytes are overwritten.
            sample: Names the sample; called only where reading fails.

        Raises:
            DataError: the shard is missing or cut, or the record's bytes are not those that were packed.
        """
        file = self._file(shard)
        content = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(content):
            try:
                count = os.preadv(file.descriptor, [content[done:]], offset + done)
            except OSError as error:
                raise self._error(shard, offset, sample(), f"read error: {error.strerror}") from error
            if count == 0:
                raise self._error(shard, offset, sample(), f"the file ends after {done} of {len(content)} bytes")
            done += count
        if zlib.crc32(content) != crc:
            raise self._error(shard, offset, sample(), "the bytes are not those that were packed (crc32 differs)")

    def read(self, shard: int, offset: int, num_bytes: int, crc: int, sample: Callable[[], str]) -> bytes:
        """Return the record at ``offset``; see ``read_into``."""
        content = np.empty(num_bytes, dtype=np.uint8)
        self.read_into(shard, offset, crc, content, sample)
        return content.tobytes()

    def close(self) -> None:
        """Close the files that no thread reads any more."""
        with self._lock:
            self._open.clear()

    def _file(self, shard: int) -> _OpenFile:
        """Return an open shard whose size is the index's.

        Raises:
            DataError: it is missing or has another size.
        """
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        info = self._shards[shard]
        path = self._folder / info.path
        try:
            file = _OpenFile(path)
        except OSError as error:
            raise DataError(
                "A shard cannot be opened.",
                where=str(path),
                found=error.strerror or str(error),
                todo="run `nd verify --repair`, or `nd pack` again",
            ) from error
        if (size := os.fstat(file.descriptor).st_size) != info.bytes:
            raise DataError(
                "A shard has another size than the index says.",
                where=str(path),
                expected=f"{info.bytes} bytes",
                found=f"{size} bytes",
                todo="run `nd verify --repair`",
            )
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return file

    def _error(self, shard: int, offset: int, sample: str, found: str) -> DataError:
        return DataError(
            "A sample cannot be read.",
            where=f"{self._folder / self._shards[shard].path}, sample {sample}, offset {offset}",
            found=found,
            todo="run `nd verify --repair`",
        )
