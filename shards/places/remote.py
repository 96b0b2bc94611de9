"""Shards on a server (http, https, s3, gs, az), read through the cache of this node and fetched ahead."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from nd_dist.config import RemoteConfig
from nd_dist.errors import DataError, NdDistError
from nd_dist.files import write_error
from shards.places.cache import NodeCache
from shards.places.store import CLOEXEC, Store, StoredFile
from shards.places.transport import ReadBlock, TransferError, Transport, open_transport

PREFETCH_DOWNLOADS = 3


class RemoteStore:
    """A folder of shards on a server; made by ``connect``.

    Args:
        url: Without a slash at its end.
        transport: Speaks the URL's protocol.
        cache: Where files are kept.
    """

    is_remote = True

    def __init__(self, url: str, transport: Transport, cache: NodeCache) -> None:
        self._url, self._transport, self._cache = url, transport, cache

    @classmethod
    def connect(cls, url: str, remote: RemoteConfig) -> RemoteStore:
        """Return the store of a URL; nothing is transferred yet.

        Raises:
            ConfigError: the protocol needs a package that is not installed.
            DataError: the cache folder cannot be used.
        """
        transport = open_transport(url, remote.s3_endpoint)
        return cls(url, transport, NodeCache(_cache_dir(remote), int(remote.cache_gb * 1e9)))

    @property
    def place(self) -> str:
        """The URL."""
        return self._url

    def read_whole(self, path: str) -> bytes:
        """Return a small file."""
        try:
            return self._transport.read_whole(f"{self._url}/{path}")
        except TransferError as error:
            raise DataError(
                "A file cannot be read from the server.",
                where=f"{self._url}/{path}",
                found=str(error),
                todo="check the URL, the network, and the credentials in the standard places",
            ) from None

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of the cached file, after fetching it where the cache lacks it."""
        while True:
            path = self._cache.get(file, self._reader(file), self._url)
            try:
                return os.open(path, os.O_RDONLY | CLOEXEC)
            except FileNotFoundError:  # evicted by another process in between
                continue

    def discard(self, file: StoredFile) -> bool:
        """Remove the cached copy; the server may have the right one."""
        self._cache.remove(file)
        return True

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Fetch files in order, a few at a time, as far as half the cache; see ``Store.prefetch``."""
        room = self._cache.max_bytes // 2
        pending: dict[Future[bool], StoredFile] = {}
        with ThreadPoolExecutor(PREFETCH_DOWNLOADS, thread_name_prefix="prefetch") as pool:
            for file in files:
                room -= file.bytes
                if room < 0:
                    break
                pending[pool.submit(self._fetch_unless_busy, file)] = file
                while len(pending) >= PREFETCH_DOWNLOADS:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)

    def _fetch_unless_busy(self, file: StoredFile) -> bool:
        """Fetch a file, unless another process of this node fetches it already."""
        return self._cache.get_unless_busy(file, self._reader(file), self._url)

    def _reader(self, file: StoredFile) -> ReadBlock:
        """Return what reads blocks of a file."""
        return self._transport.reader(f"{self._url}/{file.path}", file.bytes)


class Prefetcher:
    """Fetches files in a background thread until it is closed.

    An error ends it in silence: whoever reads the file meets the same one.

    Args:
        store: Where the files lie; nothing is done where it is a folder.
        files: What will be needed, in order; walked by the background thread.
    """

    def __init__(self, store: Store, files: Iterable[StoredFile]) -> None:
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        if store.is_remote:
            self._thread = threading.Thread(target=self._run, args=(store, files), name="prefetcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop after the files under way."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, store: Store, files: Iterable[StoredFile]) -> None:
        """Fetch (runs in the background thread)."""
        try:
            for _ in store.prefetch(self._until_closed(files)):
                pass
        except NdDistError:
            return

    def _until_closed(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Yield files until ``close`` is called."""
        for file in files:
            if self._is_closed.is_set():
                return
            yield file


def _finished(pending: dict[Future[bool], StoredFile]) -> Iterator[StoredFile]:
    """Wait for some downloads, take them off ``pending`` and yield their files."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        file = pending.pop(future)
        future.result()
        yield file


def _cache_dir(remote: RemoteConfig) -> Path:
    """Return the cache folder: one of this user, also inside a folder that users share.

    Raises:
        DataError: the default folder belongs to another user, or the folder cannot be made.
    """
    name, folder = f"nd_dist-cache-{os.geteuid()}", remote.cache_dir
    try:
        if folder is None:
            folder = Path(tempfile.gettempdir()) / name
        elif folder.is_dir() and folder.stat().st_uid != os.geteuid():
            folder = folder / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.geteuid():
            return folder
    except OSError as error:
        raise write_error(folder or Path(name), error) from error
    raise DataError("The cache folder belongs to another user.", where=str(folder), todo="set remote.cache_dir")
