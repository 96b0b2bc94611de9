"""Atomic files: temporary name, fsync, rename, fsync of the folder. Never half-written, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from nd_dist.errors import DataError, StorageError

PART_SUFFIX = ".part"


def part_path(path: Path) -> Path:
    """Return a temporary sibling of ``path`` that no other writer on any host uses."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}{PART_SUFFIX}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success fsync it and rename it to ``path``, on failure remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    part = part_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
        sync_dir(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # renamed already, or its folder was never made
            part.unlink()


def write_error(path: Path, error: OSError) -> StorageError:
    """Return the error that tells a user why ``path`` could not be written."""
    return StorageError(
        "A file could not be written; nothing was left half-written.",
        where=str(path),
        found=error.strerror or str(error),
        todo="free some space or choose another folder, then run the same command again",
    )


def sync_dir(path: Path) -> None:
    """Flush a folder's entries to disk, where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse fsync of a folder; the rename itself is atomic there
        pass
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with atomic_path(path) as part, open(part, "wb") as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as readable JSON (sorted keys, no NaN) to ``path`` atomically."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Return ``value`` as readable JSON: sorted keys, no NaN, a newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:  # Any: JSON has no static type; the callers validate
    """Return the JSON value in ``path``.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("A file is missing.", where=str(path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError("A file is not valid JSON.", where=str(path), found=str(error)) from error


def sha256_file(path: Path, chunk_bytes: int = 1 << 20) -> str:
    """Return the hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_json(value: object) -> str:
    """Return the hexadecimal sha256 of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def is_running(pid: int) -> bool:
    """Return whether a process of this host works; a zombie, whom nobody has reaped yet, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
