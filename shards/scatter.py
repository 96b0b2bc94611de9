"""Many positioned reads in one system call, so that reader threads do not queue for the interpreter at every record.

``os.preadv`` reads one place of one file. A record of some ten kilobytes is copied from memory in a few microseconds;
giving the interpreter away for that and asking for it again costs two threads more than the copy. Linux takes a whole
list of reads in one ``io_submit``: read through the page cache it returns when all are done. There is no library of
it that costs less a read than ``preadv``, so the four calls are made by number.

Reading this way is never needed: where the system has no such calls (macOS, other processors), or does not allow them
(a limit, a sandbox), nothing is read here, and the caller reads record by record. What is read is not judged here.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_READS = 128  # in one call
# io_setup, io_destroy, io_getevents, io_submit
_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
# linux/aio_abi.h, little-endian
_REQUEST = np.dtype(
    [
        ("number", "<u8"),
        ("key", "<u4"),
        ("flags", "<i4"),
        ("operation", "<u2"),  # 0: read at an offset
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("address", "<u8"),
        ("num_bytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("more_flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
_EVENT = np.dtype([("number", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])


class _Calls:
    """The system's calls.

    Args:
        numbers: Of io_setup, io_destroy, io_getevents and io_submit.
    """

    def __init__(self, numbers: tuple[int, int, int, int]) -> None:
        self.setup, self.destroy, self.getevents, self.submit = map(ctypes.c_long, numbers)
        self.freely = ctypes.CDLL(None, use_errno=True).syscall  # other Python threads run meanwhile
        self.held = ctypes.PyDLL(None, use_errno=True).syscall  # they do not: for what takes no time
        self.freely.restype = self.held.restype = ctypes.c_long


@dataclass(frozen=True)
class Places:
    """What is to be read, and where to: memory that the caller holds until the reading is over.

    Args:
        descriptors: (N,) open files.
        offsets: (N,) in their file.
        addresses: (N,) in memory.
        num_bytes: Length of every read.
    """

    descriptors: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    addresses: npt.NDArray[np.int64]
    num_bytes: int

    def requests(self) -> npt.NDArray[np.void]:
        """Return the kernel's requests (N,)."""
        requests = np.zeros(len(self.descriptors), dtype=_REQUEST)
        requests["number"] = np.arange(len(requests))
        requests["descriptor"], requests["offset"] = self.descriptors, self.offsets
        requests["address"], requests["num_bytes"] = self.addresses, self.num_bytes
        return requests


class ScatteredReads(threading.local):
    """Reads lists of places; every thread that uses it has a kernel context of its own, freed with the thread."""

    def __init__(self) -> None:
        self._context = _Context.open()

    def read(self, places: Places, step: int) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
        """Read places, ``step`` (at most ``MAX_READS``) in one call.

        Yields:
            After each call: the first place, the one behind the last, and which of them were read in full. Where one
            was not, its memory holds anything. Nothing is yielded where the system cannot read this way.
        """
        return iter(()) if self._context is None else self._context.read(places, step)


class _Context:
    """A kernel's context of asynchronous reads. For one thread."""

    def __init__(self, calls: _Calls, handle: ctypes.c_ulong) -> None:
        self._calls, self._handle = calls, handle
        self._events = np.zeros(MAX_READS, dtype=_EVENT)

    @staticmethod
    def open() -> _Context | None:
        """Return a new context, or none where the system gives none."""
        numbers = _NUMBERS.get(platform.machine())
        if not sys.platform.startswith("linux") or numbers is None:
            return None
        calls, handle = _Calls(numbers), ctypes.c_ulong(0)
        if calls.freely(calls.setup, ctypes.c_long(MAX_READS), ctypes.byref(handle)) != 0:
            return None
        return _Context(calls, handle)

    def __del__(self) -> None:
        """Give the context back; the kernel waits for reads under way, so none writes to freed memory."""
        self._calls.freely(self._calls.destroy, self._handle)

    def read(self, places: Places, step: int) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
        """See ``ScatteredReads.read``."""
        requests = places.requests()
        pointers = requests.ctypes.data + np.arange(len(requests), dtype=np.uint64) * np.uint64(_REQUEST.itemsize)
        for start in range(0, len(requests), step):
            stop = min(start + step, len(requests))
            submitted = self._calls.freely(
                self._calls.submit,
                self._handle,
                ctypes.c_long(stop - start),
                ctypes.c_void_p(pointers[start:].ctypes.data),
            )
            is_whole = np.zeros(stop - start, dtype=np.bool_)
            if submitted > 0:
                events = self._collect(submitted)
                is_whole[events["number"] - np.uint64(start)] = events["result"] == places.num_bytes
            yield start, stop, is_whole

    def _collect(self, count: int) -> npt.NDArray[np.void]:
        """Return the outcomes of all reads that were submitted: at once where the page cache had them all."""
        done = max(0, self._get_events(self._calls.held, 0, count, 0))
        while done < count:
            done += max(0, self._get_events(self._calls.freely, 1, count, done))
        return self._events[:count]

    def _get_events(self, syscall: ctypes._NamedFuncPointer, least: int, count: int, done: int) -> int:
        """Return how many more outcomes there are, after waiting for ``least``; negative after a signal."""
        found: int = syscall(
            self._calls.getevents,
            self._handle,
            ctypes.c_long(least),
            ctypes.c_long(count - done),
            ctypes.c_void_p(self._events[done:].ctypes.data),
            None,
        )
        if found < 0 and (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))
        return found
