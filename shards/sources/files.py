"""Opens the files of a data set for reading, and says what is wrong with one that cannot be read.

Damage is only one reason of many: what stands in the file and what the operating system says are looked at first.
HDF5 is opened without a lock, which a network folder may not give and a reader does not need.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from scipy.io.matlab import MatReadError

from nd_dist.errors import DataError

_DOWNLOAD = "download this file again, then run the same command"
_STRANGERS = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "run `git lfs pull` where it was cloned"),
    (b"<?xml", "a server's error page instead of the file", _DOWNLOAD),
    (b"<!doctype html", "a web page instead of the file", _DOWNLOAD),
    (b"<html", "a web page instead of the file", _DOWNLOAD),
)
_HEAD_BYTES = 64
_FAILED = ("its disk or network folder failed", "check disk, mount and network, then run again: the file may be sound")
_LOCKED = ("another program holds it locked", "close the program that has it open, then run again")
_FULL = ("this process has too many files open", "raise the limit (`ulimit -n 4096`), then run again")
_DENIED = ("it may not be read by this user", "ask its owner for the permission to read it (chmod)")
_CAUSES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), _DENIED),
    **dict.fromkeys((errno.EAGAIN, errno.ENOLCK, errno.EDEADLK, errno.ETXTBSY), _LOCKED),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FULL),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN), _FAILED),
}
_FORMAT_ERRORS = (
    *(OSError, EOFError, KeyError, IndexError, TypeError, ValueError, NotImplementedError),
    *(zlib.error, csv.Error, tarfile.TarError, ImageFileError, MatReadError),
)


@contextmanager
def reading(path: Path, what: str = "A file of the data set", todo: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an error that names the file and the cause.

    Args:
        path: The file.
        what: What it is, as the beginning of a sentence.
        todo: What to do where its content is not what was expected (default: download it again).

    Raises:
        DataError: it is missing, something else under its name, locked, forbidden, out of reach, or damaged.
    """
    try:
        _refuse_strangers(path, what)
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{what} is missing.", where=str(path), todo="download it, then run again") from error
    except _FORMAT_ERRORS as error:
        if (number := _errno(error)) is None:
            found = f"{error.args[0]!r} is not in it" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{what} is truncated, damaged or of another format.",
                where=str(path),
                found=found or type(error).__name__,
                todo=todo or _DOWNLOAD,
            ) from error
        cause, advice = _CAUSES.get(number, ("the system refuses it", "fix the cause, then run again"))
        raise DataError(
            f"{what} cannot be read: {cause}.", where=str(path), found=os.strerror(number), todo=advice
        ) from error


def open_hdf5(path: Path) -> h5py.File:
    """Return an HDF5 file that is only read, without asking for a lock; to be called inside ``reading``."""
    return h5py.File(path, "r", locking=False)


class Deliveries:
    """Knows files by how their data begin, and refuses one that was delivered under two names.

    Args:
        accept: What is packed although it cannot be real (``data.accept``).
    """

    def __init__(self, accept: Sequence[str]) -> None:
        self._is_off, self._begins = "equal-trials" in accept, dict[bytes, Path]()

    def refuse_copy(self, path: Path, begin: bytes) -> None:
        """Note how a file's data begin; nothing is known of one without any.

        Raises:
            DataError: another file's begin alike.
        """
        other = self._begins.setdefault(begin, path) if begin else path
        if other != path and not self._is_off:
            raise DataError(
                "Two files of betas hold the same data: one was delivered twice.",
                where=str(path),
                found=f"begins like {other}",
                todo="download both again; data.accept=[equal-trials] packs them as they are",
            )


def read_columns(
    path: Path, delimiter: str, integers: Sequence[str], words: Sequence[str] = ()
) -> tuple[dict[str, npt.NDArray[np.int64]], dict[str, list[str]]]:
    """Return columns of a text table by name: those of whole numbers (rows,), and those of words.

    Raises:
        DataError: the file is missing, no such table, without a row, lacks a column, or a number is no whole number.
    """
    with reading(path), open(path, newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, delimiter=delimiter)
        names = table.fieldnames or []
        if missing := [name for name in (*integers, *words) if name not in names]:
            raise ValueError(f"no column {missing[0]!r} between {delimiter!r}; the first line is {str(names)[:80]}")
        rows = list(table)
        if not rows:
            raise ValueError("no row below the first line")
        if torn := [number for number, row in enumerate(rows, 2) if None in row.values()]:
            raise ValueError(f"line {torn[0]} ends early")
        numbers = {name: np.array([_integer(row[name], name) for row in rows], dtype=np.int64) for name in integers}
        return numbers, {name: [str(row[name]) for row in rows] for name in words}


def _integer(text: str | None, column: str) -> int:
    """Return a table's whole number.

    Raises:
        ValueError: names column and text.
    """
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"column {column!r} holds {text!r} instead of a whole number") from None


def _refuse_strangers(path: Path, what: str) -> None:
    """Refuse what often lies under a data file's name without being it.

    Raises:
        DataError: says what it is.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise DataError(f"{what} is empty.", where=str(path), todo=_DOWNLOAD)
    for start, found, todo in _STRANGERS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(start):
            raise DataError(f"{what} is not what its name says.", where=str(path), found=found, todo=todo)


def _errno(error: Exception) -> int | None:
    """Return the number of the operating system's error behind an exception; HDF5 tells it in its text only."""
    told = re.search(r"errno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else 0) or None
