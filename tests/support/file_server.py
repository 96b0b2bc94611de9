"""A small HTTP server of a folder, with ranges, that can be told to misbehave; it also speaks enough S3 for s3fs.

S3 on a custom endpoint asks for ``/bucket/key`` with the same verbs and ranges, so ``/bucket`` is just a first folder.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal

Fault = Literal["cut", "flip", "busy", "forbidden", "hang up"]


@dataclass(frozen=True)
class Request:
    """A request that was answered: path, first byte asked for, signature headers."""

    path: str
    start: int
    authorization: str


@dataclass
class FileServer:
    """Serves a folder on a free port while the ``with`` block lasts.

    Args:
        folder: What is served.
        has_ranges: Whether ranges are understood (``python -m http.server`` does not).
        bytes_per_s: Speed limit; 0 is none.
        secret: Repeated in every refusal, as careless servers do.
        headers: Sent with every file.
    """

    folder: Path
    has_ranges: bool = True
    bytes_per_s: float = 0.0
    secret: str = "nothing"
    headers: dict[str, str] = field(default_factory=dict)
    faults: defaultdict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """Base name -> what goes wrong with the next answers, one after the other; the last one stays if it is ``...``."""
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FileServer:
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def count(self, suffix: str = ".tar") -> dict[str, int]:
        """Return base name -> how often its first byte was asked for."""
        counts: dict[str, int] = {}
        for request in self.requests:
            if request.path.endswith(suffix) and request.start == 0:
                name = request.path.rsplit("/", 1)[-1]
                counts[name] = counts.get(name, 0) + 1
        return counts


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FileServer

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        state = self.server_state
        path = state.folder / self.path.lstrip("/").split("?")[0]
        queue = state.faults[path.name]
        fault = queue.pop(0) if queue else None
        match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if state.has_ranges else None
        start = int(match[1]) if match else 0
        state.requests.append(Request(self.path, start, self.headers.get("Authorization", "")))
        if fault == "hang up":
            self.connection.close()
            self.close_connection = True
            return
        if fault in ("busy", "forbidden") or not path.is_file():
            self._refuse({"busy": 503, "forbidden": 403}.get(fault or "", 404))
            return
        content = path.read_bytes()
        stop = min(int(match[2]) + 1, len(content)) if match and match[2] else len(content)
        body = bytearray(content[start:stop])
        if fault == "flip":
            body[len(body) // 2] ^= 0x20
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if state.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        for name, value in state.headers.items():
            self.send_header(name, value)
        self.send_header("ETag", f'"{zlib.crc32(self.path.encode()):x}"')  # a cache keeps one file for each
        self.send_header("Last-Modified", "Thu, 01 Jan 1970 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self._send(bytes(body[: len(body) // 2] if fault == "cut" else body))
        if fault == "cut":
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        speed = self.server_state.bytes_per_s
        step = max(1, int(speed / 20)) if speed else len(body)
        try:
            for offset in range(0, len(body), max(1, step)):
                self.wfile.write(body[offset : offset + step])
                if speed:
                    time.sleep(step / speed)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _refuse(self, status: int) -> None:
        body = f"<Error><Code>Refused</Code><Message>{self.server_state.secret}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
