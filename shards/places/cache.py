"""A cache of a server's files on a node's own disk, shared by all processes of all jobs of that node.

* A file is named by its hash, so two versions never mix and two runs on the same shards share one copy.
* One process downloads it, under a lock that dies with the process; the others wait and find it.
* A half-done download stays and is continued by whoever comes next, block by block.
* A file appears under its name only after its hash was right.
* The least recently used files go first; a file that is open stays readable after it is gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nd_dist.errors import ConfigError, DataError
from nd_dist.files import sync_dir, write_error
from shards.places.store import StoredFile
from shards.places.transport import BLOCK_BYTES, ReadBlock, TransferError

TRIES = 3  # of whole files whose hash is wrong; what does not arrive, the transport tries again
_PART = re.compile(r"(?P<name>[0-9a-f]{16}-.+)\.(?P<bytes>\d+)\.part")
_WHOLE = re.compile(r"[0-9a-f]{16}-.+(?<!\.part)")


@dataclass(frozen=True)
class _Entry:
    """A file in the cache: what it counts for the limit, what it has on disk, when it was last used."""

    path: Path
    promised: int
    present: int
    used: float


class NodeCache:
    """The cache; thread-safe, and safe for several processes on one node.

    Args:
        folder: Its folder, on a disk of the node itself.
        max_bytes: Its size.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self.max_bytes = folder, max_bytes
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error

    def get(self, file: StoredFile, read_block: ReadBlock, source: str) -> Path:
        """Return the path of a file's copy, after downloading it where it is not there.

        Args:
            file: What is wanted.
            read_block: Returns bytes start .. stop-1 of it, or fewer but some; raises ``TransferError``.
            source: Where it comes from, for messages.

        Raises:
            DataError: it cannot be transferred, its hash stays wrong, or the disk is full.
            ConfigError: it is larger than the cache.
        """
        path = self._path(file)
        if not _touch(path, file.bytes):
            with _locked(self._lock_path(path.name)):
                if not _touch(path, file.bytes):
                    self._fetch(file, read_block, source)
        return path

    def get_unless_busy(self, file: StoredFile, read_block: ReadBlock, source: str) -> bool:
        """Like ``get``, but return False at once where another process or thread downloads the file."""
        path = self._path(file)
        if _touch(path, file.bytes):
            return True
        with _locked(self._lock_path(path.name), wait=False) as is_mine:
            if is_mine and not _touch(path, file.bytes):
                self._fetch(file, read_block, source)
            return is_mine

    def remove(self, file: StoredFile) -> None:
        """Forget the copy of a file."""
        self._path(file).unlink(missing_ok=True)

    def _path(self, file: StoredFile) -> Path:
        return self._folder / f"{file.sha256[:16]}-{PurePosixPath(file.path).name}"

    def _lock_path(self, name: str) -> Path:
        return self._folder / "locks" / name

    def _fetch(self, file: StoredFile, read_block: ReadBlock, source: str) -> None:
        """Download a file; the caller holds its lock."""
        path = self._path(file)
        part = path.with_name(f"{path.name}.{file.bytes}.part")
        problem = f"{TRIES} tries; the hash of what arrived is not the index's"
        try:
            self._make_room(part, file)
            for _ in range(TRIES):
                if _download(part, file, read_block) == file.sha256:
                    os.replace(part, path)
                    sync_dir(self._folder)
                    return
                part.unlink()
        except TransferError as error:
            problem = str(error)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise write_error(part, error) from error
        raise DataError(
            "A file could not be transferred from the server.",
            where=f"{source}/{file.path}",
            expected=f"{file.bytes} bytes with sha256 {file.sha256}",
            found=problem,
            todo="check server and network, then run the same command again: it resumes where it stopped",
        )

    def _make_room(self, part: Path, file: StoredFile) -> None:
        """Evict until a file fits into the cache and onto the disk, and reserve its place.

        Raises:
            ConfigError: it never will.
            DataError: the disk is full of other things.
        """
        if file.bytes > self.max_bytes:
            raise ConfigError(
                "A shard is larger than the cache.",
                where=file.path,
                expected=f"remote.cache_gb of at least {file.bytes / 1e9:.3f}",
                found=self.max_bytes / 1e9,
            )
        with _locked(self._folder / "locks" / "room"):
            entries = sorted((entry for entry in self._entries() if entry.path != part), key=lambda entry: entry.used)
            has = part.stat().st_size if part.exists() else 0
            for entry in [*entries, None]:
                promised = sum(other.promised - other.present for other in entries)
                free = shutil.disk_usage(self._folder).free - promised
                if (
                    sum(other.promised for other in entries) + file.bytes <= self.max_bytes
                    and file.bytes - has <= free
                ):
                    part.touch()
                    return
                if entry is not None and self._evict(entry):
                    entries.remove(entry)
        raise DataError(
            "The disk of the cache is full, of other files than the cache's or of downloads under way.",
            where=str(self._folder),
            expected=f"{file.bytes} bytes for {file.path}",
            found=f"{shutil.disk_usage(self._folder).free} bytes free, cache limit {self.max_bytes}",
            todo="free some space, or set remote.cache_dir and remote.cache_gb, then run the same command again",
        )

    def _entries(self) -> Iterator[_Entry]:
        """Yield what lies in the cache."""
        for path in self._folder.iterdir():
            match = _PART.fullmatch(path.name)
            if match is None and not _WHOLE.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                stat = path.stat()
                yield _Entry(path, int(match["bytes"]) if match else stat.st_size, stat.st_size, stat.st_mtime)

    def _evict(self, entry: _Entry) -> bool:
        """Remove an entry, unless it is a download that someone is busy with."""
        match = _PART.fullmatch(entry.path.name)
        if match is None:
            entry.path.unlink(missing_ok=True)
            return True
        with _locked(self._lock_path(match["name"]), wait=False) as is_abandoned:
            if is_abandoned:
                entry.path.unlink(missing_ok=True)
            return is_abandoned


def _download(part: Path, file: StoredFile, read_block: ReadBlock) -> str:
    """Continue or begin a download, flush it to disk and return the sha256 of the whole file.

    Raises:
        TransferError: a block did not arrive; those before it are kept.
    """
    digest = hashlib.sha256()
    with open(part, "r+b" if part.exists() else "w+b", buffering=0) as stream:
        stream.truncate(min(file.bytes, part.stat().st_size))
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        done = stream.tell()
        while done < file.bytes:
            content = read_block(done, min(done + BLOCK_BYTES, file.bytes))
            digest.update(content)
            written = 0
            while written < len(content):
                written += stream.write(memoryview(content)[written:])
            done += len(content)
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _touch(path: Path, num_bytes: int) -> bool:
    """Return whether a file is there with the right size, and note that it was used."""
    try:
        if path.stat().st_size != num_bytes:
            return False
        with suppress(PermissionError):  # another user's, who lets us read it
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a path; it ends with the process at the latest. Yields whether it could be had.

    Raises:
        DataError: the lock file cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            try:
                yield True
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has a copy, which would keep it
    finally:
        os.close(descriptor)
