"""Shards on a server (http, https, s3), read through the cache of this node.

fsspec speaks the protocols; a file is fetched block by block with ranges, so a cut transfer goes on where it ended.
What a server or a package says is never repeated in a message: it may hold credentials or signed URLs. Messages name
the kind of error and its status only, and carry no chained exception into a log.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from nd_dist.config import RemoteConfig
from nd_dist.errors import ConfigError, DataError
from shards.cache import NodeCache, TransferError
from shards.store import CLOEXEC, StoredFile

CONNECT_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 60.0
PREFETCH_DOWNLOADS = 3
_RETRIED_STATUS = (408, 429)  # 4xx that may pass; any other 4xx stays


class RemoteStore:
    """A folder of shards on a server; made by ``connect``.

    Args:
        url: Without a slash at its end.
        remote: Cache and server settings.
        cache: Where files are kept.
    """

    is_remote = True

    def __init__(self, url: str, remote: RemoteConfig, cache: NodeCache) -> None:
        self._url, self._remote, self._cache = url, remote, cache
        self._connect()

    def _connect(self) -> None:
        """Make the file system of this process; fsspec's do not survive a fork."""
        self._pid = os.getpid()
        self._files, self._errors = _file_system(self._url, self._remote)

    @classmethod
    def connect(cls, url: str, remote: RemoteConfig) -> RemoteStore:
        """Return the store of a URL; nothing is transferred yet.

        Raises:
            ConfigError: the protocol needs a package that is not installed.
            DataError: the cache folder cannot be used.
        """
        return cls(url, remote, NodeCache(_cache_dir(remote), int(remote.cache_gb * 1e9)))

    @property
    def place(self) -> str:
        """The URL."""
        return self._url

    def read_whole(self, path: str) -> bytes:
        """Return a small file.

        Raises:
            DataError: it is missing or cannot be read.
        """
        try:
            return bytes(self._files.cat_file(f"{self._url}/{path}"))
        except self._errors as error:
            raise DataError(
                "A file cannot be read from the server.",
                where=f"{self._url}/{path}",
                found=describe(error),
                todo="check the URL, the network, and the credentials in the standard places",
            ) from None

    def open(self, file: StoredFile) -> int:
        """Return a descriptor of the cached file, after fetching it where the cache lacks it.

        Raises:
            DataError: it cannot be transferred as the index states it, or the cache has no room.
        """
        while True:
            path = self._cache.get(file, lambda start, stop: self._read_block(file, start, stop), self._url)
            try:
                return os.open(path, os.O_RDONLY | CLOEXEC)
            except FileNotFoundError:  # evicted by another process in between
                continue

    def discard(self, file: StoredFile) -> bool:
        """Remove the cached copy; the server may have the right one."""
        self._cache.remove(file)
        return True

    def prefetch(self, files: Iterable[StoredFile]) -> Iterator[StoredFile]:
        """Fetch files in order, a few at a time, as far as half the cache; see ``Store.prefetch``.

        Raises:
            DataError: see ``open``.
        """
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
        return self._cache.get_unless_busy(file, lambda start, stop: self._read_block(file, start, stop), self._url)

    def _read_block(self, file: StoredFile, start: int, stop: int) -> bytes:
        """Return bytes ``start .. stop-1`` of a file.

        Raises:
            TransferError: the transfer failed; says whether trying again may help.
        """
        if self._pid != os.getpid():
            self._connect()
        try:
            content = bytes(self._files.cat_file(f"{self._url}/{file.path}", start=start, end=stop))
        except self._errors as error:
            raise TransferError(describe(error), is_final=_is_final(error)) from None
        if len(content) == file.bytes and (start, stop) != (0, file.bytes):
            return content[start:stop]  # a server without ranges sends the whole file
        if len(content) > stop - start:
            raise TransferError(f"{len(content)} bytes instead of {stop - start}", is_final=True)
        return content


def _finished(pending: dict[Future[bool], StoredFile]) -> Iterator[StoredFile]:
    """Wait for some downloads, take them off ``pending`` and yield their files."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        file = pending.pop(future)
        future.result()
        yield file


def describe(error: Exception) -> str:
    """Return the kind of an error and its status, and nothing of its text, which may hold credentials."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore
    number = error.errno if isinstance(error, OSError) else None
    status = code or getattr(error, "status", None) or (os.strerror(number) if number else None)
    return f"{type(error).__name__}{f' ({status})' if status else ''}"


def _is_final(error: Exception) -> bool:
    """Return whether trying again is pointless."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _RETRIED_STATUS
    return isinstance(error, FileNotFoundError | PermissionError) or "Credentials" in type(error).__name__


def _cache_dir(remote: RemoteConfig) -> Path:
    """Return the cache folder.

    Raises:
        DataError: the default folder belongs to another user.
    """
    if remote.cache_dir is not None:
        return remote.cache_dir
    folder = Path(tempfile.gettempdir()) / f"nd_dist-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DataError("The cache folder belongs to another user.", where=str(folder), todo="set remote.cache_dir")
    return folder


def _file_system(url: str, remote: RemoteConfig) -> tuple[Any, tuple[type[Exception], ...]]:  # Any: fsspec is untyped
    """Return fsspec's file system of a URL and the errors that it raises.

    Raises:
        ConfigError: a package is missing.
    """
    import fsspec

    scheme = url.split("://", 1)[0]
    try:
        if scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            return fsspec.filesystem("s3", endpoint_url=remote.s3_endpoint), (OSError, BotoCoreError, ClientError)
        import aiohttp
    except ImportError as error:
        raise ConfigError(
            f"Reading {scheme}:// needs a package that is not installed.",
            where=url,
            found=str(error),
            todo="pip install 'nd-dist[remote]'" if scheme == "s3" else "pip install 'fsspec[http]'",
        ) from error
    client = {
        "trust_env": True,  # proxies, ~/.netrc
        "timeout": aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S),
        "read_bufsize": 1 << 22,
    }
    return fsspec.filesystem(scheme, client_kwargs=client), (OSError, EOFError, aiohttp.ClientError)
