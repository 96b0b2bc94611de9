"""Memory for batches that is used again as soon as nobody holds it, and never before.

Fresh batches of tens of megabytes cost as much as reading them (page faults). A lent array, every view of it and every
tensor made of it keep its memory; when the last one is gone the memory goes back to the pool. A consumer that keeps
its batches only makes the pool larger. One rule is left: who copies a batch to a GPU without waiting holds it until
the copy is done.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from math import prod

import numpy as np
import numpy.typing as npt
import torch

Memory = bytearray | memoryview


def page_locked(num_bytes: int) -> Memory:
    """Return memory from which a GPU copies at full speed while the CPU goes on."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data


class BufferPool:
    """Lends arrays; thread-safe (its only shared state are deques, whose append and pop are atomic).

    Args:
        allocate: Returns fresh memory of a number of bytes.
    """

    def __init__(self, allocate: Callable[[int], Memory] = bytearray) -> None:
        self._allocate = allocate
        self._free: defaultdict[int, deque[Memory]] = defaultdict(deque)

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

    @property
    def num_free_bytes(self) -> int:
        """Bytes that wait to be lent."""
        return sum(num_bytes * len(free) for num_bytes, free in self._free.items())
