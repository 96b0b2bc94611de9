"""How bytes come from a server: http(s) with the standard library, s3, gs and az with fsspec.

http(s) reads one response straight into one buffer a thread, which costs half of the CPU time of obstore and a third
of fsspec's own client; proxies come from the environment, credentials from ``~/.netrc``. What may pass is tried again.
What a server or a package says is never repeated: it may hold credentials or signed URLs. Errors name their kind and
status only.
"""

from __future__ import annotations

import base64
import http.client
import importlib
import netrc
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from nd_dist.errors import ConfigError

BLOCK_BYTES = 16 << 20
TIMEOUT_S = 60.0  # without a byte
TRIES = 5
PAUSE_S = 0.2  # before the second try; doubles with each
_RETRIED_STATUS = (408, 429)  # 4xx that may pass; any other 4xx stays
_HTTP_ERRORS = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors
_BUFFERS = threading.local()

ReadBlock = Callable[[int, int], bytes | memoryview]
Content = TypeVar("Content", bytes, memoryview)

_CLOUDS = {  # protocol -> package that fsspec needs, and the errors that are not OSErrors
    "s3": ("s3fs", ("botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError")),
    "gs": ("gcsfs", ("gcsfs.retry:HttpError", "aiohttp:ClientError", "google.auth.exceptions:GoogleAuthError")),
    "az": ("adlfs", ("azure.core.exceptions:AzureError",)),
}


class TransferError(Exception):
    """A block could not be transferred; says of what kind the failure was.

    Args:
        what: For the message; must hold no credentials.
        is_final: Whether trying again is pointless.
    """

    def __init__(self, what: str, *, is_final: bool = False) -> None:
        super().__init__(what)
        self.is_final = is_final


class Transport(Protocol):
    """Reads files of a server, and tries again what may pass."""

    def read_whole(self, url: str) -> bytes:
        """Return a file; raises ``TransferError``."""

    def reader(self, url: str, num_bytes: int) -> ReadBlock:
        """Return what reads blocks of a file of a known size, best in order."""


def open_transport(url: str, s3_endpoint: str | None) -> Transport:
    """Return what speaks the protocol of a URL.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    protocol = url.split("://", 1)[0]
    return CloudTransport(protocol, s3_endpoint) if protocol in _CLOUDS else HttpTransport()


def retried(read: Callable[[], Content]) -> Content:
    """Return what ``read`` returns, which is called again after a pause where it failed or returned nothing.

    Raises:
        TransferError: the last failure.
    """
    for tries in range(1, TRIES + 1):
        try:
            if content := read():
                return content
            failure = TransferError("the server's file ends early")
        except TransferError as error:
            failure = error
        if failure.is_final or tries == TRIES:
            break
        time.sleep(PAUSE_S * 2 ** (tries - 1))
    raise TransferError(f"{failure} ({tries} tries)" if tries > 1 else str(failure), is_final=True) from None


class HttpTransport:
    """http and https."""

    def read_whole(self, url: str) -> bytes:
        """Return a file."""

        def read() -> bytes:
            try:
                with _open(url, 0) as response:
                    return response.read()
            except _HTTP_ERRORS as error:
                raise TransferError(describe(error), is_final=_is_final(error)) from None

        return retried(read)

    def reader(self, url: str, num_bytes: int) -> ReadBlock:
        """Return what reads blocks of a file from one response, and asks again where it was cut."""
        return _HttpReader(url, num_bytes)


class _HttpReader:
    """Reads a file block by block.

    Args:
        url: The file.
        num_bytes: Its size.
    """

    def __init__(self, url: str, num_bytes: int) -> None:
        self._url, self._num_bytes = url, num_bytes
        self._response: http.client.HTTPResponse | None = None
        self._position = 0

    def __call__(self, start: int, stop: int) -> memoryview:
        """Return bytes ``start .. stop-1``, or fewer; they stay valid until this thread reads the next block.

        Raises:
            TransferError: nothing arrived.
        """
        return retried(lambda: self._read(start, stop))

    def _read(self, start: int, stop: int) -> memoryview:
        """Read once what ``__call__`` returns.

        Raises:
            TransferError: nothing arrived.
        """
        content = memoryview(_buffer(stop - start))
        done = 0
        try:
            response = self._response_at(start)
            while done < len(content) and (count := response.readinto(content[done:])):
                done += count
        except _HTTP_ERRORS as error:
            self._close()
            if not done:
                raise TransferError(describe(error), is_final=_is_final(error)) from None
        self._position = start + done
        if done < len(content) or self._position == self._num_bytes:
            self._close()
        return content[:done]

    def _response_at(self, start: int) -> http.client.HTTPResponse:
        """Return a response whose next byte is ``start``."""
        if self._response is None or self._position != start:
            self._close()
            self._response = _open(self._url, start)
            if self._response.status != http.client.PARTIAL_CONTENT:  # the server knows no ranges: skip
                _skip(self._response, start)
        return self._response

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class CloudTransport:
    """s3, gs and az, through fsspec.

    Args:
        protocol: One of these.
        s3_endpoint: URL of an S3-compatible server; None: AWS.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, protocol: str, s3_endpoint: str | None) -> None:
        self._protocol = protocol
        self._options = {"endpoint_url": s3_endpoint} if protocol == "s3" else {}
        self._connect()

    def _connect(self) -> None:
        """Make the file system of this process; fsspec's do not survive a fork."""
        package, names = _CLOUDS[self._protocol]
        try:
            import fsspec

            self._files: Any = fsspec.filesystem(self._protocol, **self._options)  # Any: fsspec is untyped
            places = [name.split(":") for name in names]
            errors = [getattr(importlib.import_module(module), error) for module, error in places]
        except ImportError as error:
            extra = "'nd-dist[remote]'" if self._protocol == "s3" else package
            raise ConfigError(
                f"Reading {self._protocol}:// needs a package that is not installed.",
                found=str(error),
                todo=f"pip install {extra}",
            ) from error
        self._errors: tuple[type[Exception], ...] = (OSError, *errors)
        self._pid = os.getpid()

    def _cat(self, url: str, start: int | None, stop: int | None) -> bytes:
        """Return a file, or a part of it.

        Raises:
            TransferError: it cannot be read.
        """
        if self._pid != os.getpid():
            self._connect()
        try:
            return bytes(self._files.cat_file(url, start=start, end=stop))
        except self._errors as error:
            raise TransferError(describe(error), is_final=_is_final(error)) from None

    def read_whole(self, url: str) -> bytes:
        """Return a file."""
        return retried(lambda: self._cat(url, None, None))

    def reader(self, url: str, num_bytes: int) -> ReadBlock:
        """Return what reads blocks of a file, one request each."""
        del num_bytes
        return lambda start, stop: retried(lambda: self._cat(url, start, stop))


def describe(error: Exception) -> str:
    """Return the kind of an error and its status, and nothing of its text, which may hold credentials."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return describe(error.reason)
    response = getattr(error, "response", None)
    status = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore
    status = status or getattr(error, "code", None)  # urllib
    if status is None and isinstance(error, OSError) and error.errno:
        status = os.strerror(error.errno)
    return f"{type(error).__name__}{f' ({status})' if status else ''}"


def _is_final(error: Exception) -> bool:
    """Return whether trying again is pointless."""
    status = getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _RETRIED_STATUS
    return isinstance(error, FileNotFoundError | PermissionError) or "Credentials" in type(error).__name__


def _open(url: str, start: int) -> http.client.HTTPResponse:
    """Return the response to a request for a file from byte ``start`` on; redirects and proxies are followed."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    if credentials := _netrc(urlsplit(url).hostname or ""):
        request.add_unredirected_header("Authorization", credentials)  # never sent on to another host
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    return response


def _netrc(host: str) -> str:
    """Return the header that ``~/.netrc`` holds for a host, empty where it has none."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    if found is None:
        return ""
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode("ascii")


def _skip(response: http.client.HTTPResponse, count: int) -> None:
    """Read and forget bytes."""
    while count > 0 and (content := response.read(min(count, BLOCK_BYTES))):
        count -= len(content)


def _buffer(num_bytes: int) -> bytearray:
    """Return this thread's buffer, of exactly this size; fresh memory for each block would cost as much as reading."""
    buffer: bytearray | None = getattr(_BUFFERS, "block", None)
    if buffer is None or len(buffer) != num_bytes:
        buffer = _BUFFERS.block = bytearray(num_bytes)
    return buffer
