"""Where the files of an index come from: a local folder, or a server through the cache of this node.

A store opens a file whose size and hash the index states. A folder is read in place (a shared parallel file system
too); what a server sends is hashed before anyone sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from nd_dist.config import RemoteConfig
from nd_dist.errors import ConfigError, DataError
from nd_dist.location import parse_location

CLOEXEC = getattr(os, "O_CLOEXEC", 0)


class StoredFile(Protocol):
    """A file as the index states it (a shard or a table)."""

    @property
    def path(self) -> str:
        """Path below the store's place."""

    @property
    def bytes(self) -> int:
        """Size."""

    @property
    def sha256(self) -> str:
        """Hexadecimal hash."""


class Store(Protocol):
    """A place that holds an index and its files."""

    @property
    def place(self) -> str:
        """Folder or URL, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether files are fetched into a cache, where they may be replaced while they are open."""

    def read_whole(self, path: str) -> bytes:
        """Return a small file whose size and hash nobody states (the index itself)."""

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of a file; the caller checks the size and closes it."""

    def discard(self, file: StoredFile) -> bool:
        """Forget a copy that turned out wrong; return whether opening it again may help."""

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Fetch files that will be needed, in order, and yield each once it is there or someone else fetches it."""


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
        """Return a small file.

        Raises:
            DataError: it is missing or cannot be read.
        """
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise DataError(
                "A file is missing.", where=str(self.folder / path), found=error.strerror or str(error)
            ) from error

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of a file.

        Raises:
            DataError: it cannot be opened.
        """
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
        """Keep the file: the folder is the only copy."""
        del file
        return False

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Yield nothing: a folder is read in place."""
        del files
        return iter(())


def open_store(location: Path | str, remote: RemoteConfig | None = None) -> Store:
    """Return the store at a location.

    Args:
        location: A folder, or a URL (see ``nd_dist.location.parse_location``).
        remote: Cache and server settings (default: those of ``RemoteConfig``); not looked at for a folder.

    Raises:
        ConfigError: this is neither a folder nor a URL, or a package that its protocol needs is not installed.
        DataError: the cache folder cannot be used.
    """
    try:
        location = parse_location(location)
    except ValueError as error:
        raise ConfigError("This is neither a folder nor a URL of shards.", found=str(error)) from None
    if isinstance(location, Path):
        return FolderStore(location)
    from shards.places.remote import RemoteStore  # imports this module

    return RemoteStore.connect(location, remote or RemoteConfig())
