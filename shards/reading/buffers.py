"""Memory for batches that is used again as soon as nobody holds it, and never before.

Fresh batches of tens of megabytes cost as much as reading them (page faults). A lent array, every view of it and every
tensor made of it keep its memory; when the last one is gone the memory goes back to the pool. So there is no rule for
the consumer to remember, and one that keeps its batches only makes the pool larger. (A forked process does not count:
copy a batch before it is handed to one.)

On Linux all memory of a pool lies in one file without a name (memfd), which a reader process maps and fills. It is
mapped here in large pieces, because every mapping holds an open file; a piece takes memory only where it was written.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import defaultdict, deque
from math import prod

import numpy as np
import numpy.typing as npt

_PIECE_BYTES = 256 * 1024**2


class BufferPool:
    """Lends arrays; thread-safe."""

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[bytearray | memoryview]] = defaultdict(deque)  # append and pop are atomic
        self._offsets: dict[int, int] = {}
        self._lock = threading.Lock()
        self.descriptor = -1  # of the file; there is none on macOS
        self.identity = (0, 0)  # device and number of the file
        self.num_bytes = 0  # of the file
        self._piece = memoryview(b"")  # what is left of the last one
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
            status = os.fstat(self.descriptor)
            self.identity = (status.st_dev, status.st_ino)
            weakref.finalize(self, os.close, self.descriptor)

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.floating]:
        """Return an array of arbitrary content, whose memory comes back when the array and all views are gone."""
        kind = np.dtype(dtype)
        num_bytes = max(1, prod(shape) * kind.itemsize)
        free = self._free[num_bytes]
        try:
            memory = free.pop()
        except IndexError:
            memory = self._allocate(num_bytes)
        # Views made later keep `flat` alive (their base), because NumPy collapses chains of views only up to an array
        # whose own base is no array; so `flat` dies last.
        flat = np.frombuffer(memory, dtype=kind, count=prod(shape))
        weakref.finalize(flat, free.append, memory).atexit = False
        return flat.reshape(shape)

    def offset(self, lent: npt.NDArray[np.floating]) -> int:
        """Return where in the file the memory of a lent array begins."""
        return self._offsets[lent.ctypes.data]

    @property
    def num_free_bytes(self) -> int:
        """Bytes that wait to be lent."""
        return sum(num_bytes * len(free) for num_bytes, free in self._free.items())

    def _allocate(self, num_bytes: int) -> bytearray | memoryview:
        """Return new memory, of the file where there is one."""
        if self.descriptor < 0:
            return bytearray(num_bytes)
        taken = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with self._lock:
            if taken > len(self._piece):
                self._piece = self._grow(max(taken, _PIECE_BYTES))
            offset = self.num_bytes - len(self._piece)
            memory, self._piece = self._piece[:num_bytes], self._piece[taken:]
        self._offsets[np.frombuffer(memory, dtype=np.uint8).ctypes.data] = offset
        return memory

    def _grow(self, num_bytes: int) -> memoryview:
        """Return a new piece at the end of the file."""
        start = self.num_bytes
        os.ftruncate(self.descriptor, start + num_bytes)
        self.num_bytes = start + num_bytes  # once the file is as long: a reader process maps as much
        return memoryview(mmap.mmap(self.descriptor, num_bytes, offset=start))
