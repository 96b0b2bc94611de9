"""Writes one shard: a plain USTAR tar whose bytes depend on its samples only, atomically, with hash and offsets.

``webdataset.TarWriter`` writes the members; this file fixes what it leaves to chance (time, owner), hashes the bytes
as they pass, and remembers where every record lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nd_dist.files import atomic_path
from shards.format.codec import NPY_HEADER_BYTES, checksum
from shards.format.index import ShardInfo

TAR_BLOCK_BYTES = 512
MAX_NAME_BYTES = 100  # longer names would need a second header


@dataclass(frozen=True)
class Record:
    """Where a record lies in its shard.

    Args:
        offset: Of its first byte in the tar (after the npy header).
        bytes: Its length.
        checksum: Of its bytes.
    """

    offset: int
    bytes: int
    checksum: int


class _HashingFile:
    """Passes writes on to a file and hashes them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.is_done = False

    def write(self, content: bytes) -> int:
        if self.is_done:  # tarfile's destructor writes once more after a failure
            return len(content)
        self.digest.update(content)
        self.num_bytes += len(content)
        return self._stream.write(content)


class ShardWriter:
    """Adds samples of one member each to an open shard; made by ``open_shard``."""

    def __init__(self, stream: _HashingFile) -> None:
        from webdataset import TarWriter  # imports torch: only ranks that write pay for it

        self._file = stream
        self._tar: Any = TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False)  # Any: untyped
        self.records: list[Record] = []

    def add_array(self, key: str, field: str, header: bytes, record: bytes) -> None:
        """Add an npy member: its 128-byte header, then the record."""
        assert len(header) == NPY_HEADER_BYTES
        self._add(key, field, header + record, skip=NPY_HEADER_BYTES)

    def add_bytes(self, key: str, field: str, content: bytes) -> None:
        """Add a member whose whole content is the record (a PNG picture)."""
        self._add(key, field, content, skip=0)

    def _add(self, key: str, field: str, content: bytes, skip: int) -> None:
        assert "." not in key, "WebDataset splits names at the first dot"
        assert len(f"{key}.{field}") <= MAX_NAME_BYTES
        offset = int(self._tar.tarstream.offset) + TAR_BLOCK_BYTES + skip
        record = memoryview(content)[skip:]
        self._tar.write({"__key__": key, field: content})
        self.records.append(Record(offset, len(record), checksum(record)))

    def locate(self, rows: npt.NDArray[np.void]) -> None:
        """Tell rows of a table, one a record, where their record lies and its checksum; and its bytes, if they ask."""
        for name in ("offset", "bytes", "checksum"):
            if name in (rows.dtype.names or ()):
                rows[name] = [getattr(record, name) for record in self.records]

    def info(self, path: str, kind: str, group: str, invalid_voxels: int = 0) -> ShardInfo:
        """Return what the index says of the shard, once it is closed; see ``ShardInfo``."""
        return ShardInfo(
            path=path,
            kind=kind,
            group=group,
            samples=len(self.records),
            bytes=self._file.num_bytes,
            sha256=self._file.digest.hexdigest(),
            invalid_voxels=invalid_voxels,
        )

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """Yield a writer for the shard ``path``, which appears whole when the block ends without an error.

    Raises:
        DataError: the file cannot be written (disk full, no permission).
    """
    with atomic_path(path) as part, open(part, "wb", buffering=1 << 20) as stream:
        hashing = _HashingFile(stream)
        writer = ShardWriter(hashing)
        try:
            yield writer
            writer.close()
        finally:
            hashing.is_done = True
