"""Where the files of an index come from: a local folder, or a server through the cache of this node.

A store opens a file whose size and hash the index states. A folder is read in place (a shared parallel file system
too); what a server sends is hashed before anyone sees it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from nd_dist.errors import DataError

CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class StoredFile(BaseModel):
    """A file as the index states it (a shard or a table)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str
    """Path below the store's place."""
    bytes: int
    """Size."""
    sha256: str
    """Hexadecimal hash."""


class Store(Protocol):
    """A place that holds an index and its files. ``DataError`` says what is missing or cannot be had."""

    @property
    def place(self) -> str:
        """Folder or URL, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether files are fetched into a cache, where they may be replaced while they are open."""

    def read_whole(self, path: str) -> bytes:
        """Return a file as it lies there now, past every cache."""

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of a file; the caller checks the size and closes it."""

    def discard(self, file: StoredFile) -> bool:
        """Forget a copy that turned out wrong; return whether opening it again may help."""

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Fetch files that will be needed, in order, and yield each once it is there or someone else fetches it."""


def read_checked(store: Store, file: StoredFile) -> bytes:
    """Return a file's bytes, which are those that the index states; a wrong copy is dropped and fetched once more.

    Raises:
        DataError: they cannot be had.
    """
    can_help = True
    while True:
        found = ""
        try:
            with open(store.open(file), "rb") as stream:
                content = stream.read()
            if hashlib.sha256(content).hexdigest() == file.sha256:
                return content
            found = "its hash differs from the index"
        except OSError as error:
            found = f"read error: {error.strerror}"
        if not (can_help and store.discard(file)):
            break
        can_help = False
    raise DataError(
        "A file of the shards cannot be read: it is cut or damaged.",
        where=f"{store.place}/{file.path}",
        found=found,
        todo="run `nd verify --repair` on the folder that was packed" + (", copy it again" * store.is_remote),
    )


class FolderStore:
    """A local folder.

    Args:
        folder: The folder.
    """

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def read_whole(self, path: str) -> bytes:
        """Return a file."""
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise DataError(
                "A file is missing.", where=str(self.folder / path), found=error.strerror or str(error)
            ) from error

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of a file."""
        path = self.folder / file.path
        try:
            return os.open(path, os.O_RDONLY | CLOEXEC)
        except OSError as error:
            raise DataError(
                "A file of the shards cannot be opened.",
                where=str(path),
                found=error.strerror or str(error),
                todo="run `nd verify --repair`",
            ) from error

    def discard(self, file: StoredFile) -> bool:
        """Keep the file, the only copy; opened again, it may be one that was put in its place meanwhile."""
        path = self.folder / file.path
        return path.is_file() and path.stat().st_size == file.bytes

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Yield nothing: a folder is read in place."""
        del files
        return iter(())
