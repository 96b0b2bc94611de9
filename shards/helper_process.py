"""What a reader process runs: it does tasks from standard input until that ends, and says which records are right.

Nothing but the standard library and the checksum is imported, so that it starts in ten milliseconds.

Every message is its length (8 bytes) and its content. A task is marshalled: the descriptor (the parent's) and size of
the memory's file, whether the records were read before, identity and descriptor (the parent's) of every shard, and one
buffer of 64-bit columns, each with a number a record: position among the shards, offset there, place in the memory,
length, checksum. The answer has one byte a record, 1 where it is right. The very first answer is empty: the process is
ready.

Records that were read before are copied from a mapping of their shard, which costs half of what a system call costs
(the pages need not be looked up again). All pages that a process touches count as its own in what ``top`` shows,
although they are the page cache's and shared, so there is a limit. Where they do not stay in memory, mapping is given
up: a page fault reads four kilobytes where a system call reads a record.
"""

from __future__ import annotations

import gc
import marshal
import mmap
import os
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import IO

from shards.checksum import checksum
from shards.open_files import max_open_shards

NUM_COLUMNS = 5
MAX_MAPPED_SHARE = 1 / 32  # of the machine's memory
MAX_FAULT_SHARE = 1 / 8  # page faults that waited for a disk, of the records of a task


class Shards:
    """Shards by their identity: mapped while there is room, else open, the least recently used closed first.

    Args:
        folder: Holds the files that the parent has open, by descriptor.
        room: Bytes that may be mapped.
        max_open: Shards kept open.
    """

    def __init__(self, folder: str, room: int, max_open: int) -> None:
        self._folder, self._room, self._max_open = folder, room, max_open
        self._mapped: dict[object, memoryview] = {}
        self._open: OrderedDict[object, int] = OrderedDict()

    def find(self, shards: Iterable[tuple[object, int]], may_map: bool) -> list[memoryview | int]:
        """Return the mappings or descriptors of shards, which are good until the next call.

        Raises:
            OSError: one cannot be opened.
        """
        while len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return [self._find(identity, descriptor, may_map) for identity, descriptor in shards]

    def unmap(self) -> None:
        """Drop all mappings, and make no more."""
        self._mapped.clear()
        self._room = 0

    def _find(self, identity: object, parents: int, may_map: bool) -> memoryview | int:
        """Return the mapping or descriptor of a shard, ``parents`` being the parent's descriptor."""
        if identity in self._mapped:
            return self._mapped[identity]
        if identity in self._open:
            self._open.move_to_end(identity)
        else:
            self._open[identity] = os.open(f"{self._folder}/{parents}", os.O_RDONLY)
        descriptor = self._open[identity]
        num_bytes = os.fstat(descriptor).st_size
        if not may_map or num_bytes > self._room:
            return descriptor
        self._room -= num_bytes
        mapping = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        mapping.madvise(mmap.MADV_RANDOM)  # else the system may read megabytes around a missing page
        self._mapped[identity] = memoryview(mapping)
        os.close(self._open.pop(identity))
        return self._mapped[identity]


def send(stream: IO[bytes], message: bytes) -> None:
    """Write a message."""
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """Read a message.

    Raises:
        EOFError: there is none any more.
    """
    head = stream.read(8)
    message = stream.read(int.from_bytes(head, "little"))
    if len(head) < 8 or len(message) < int.from_bytes(head, "little"):
        raise EOFError
    return message


def serve() -> None:
    """Do tasks until standard input ends.

    Raises:
        OSError: a shard or the memory cannot be opened; the process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent decides
    gc.disable()  # nothing here refers to itself
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = f"/proc/{os.getppid()}/fd"
    shards, memory = Shards(folder, int(machine_bytes * MAX_MAPPED_SHARE), max_open_shards()), memoryview(b"")
    send(sys.stdout.buffer, b"")
    while True:
        try:
            (descriptor, num_bytes), were_read_before, files, columns = marshal.loads(receive(sys.stdin.buffer))
        except EOFError:
            return
        if len(memory) != num_bytes:  # it only grows
            with open(f"{folder}/{descriptor}", "r+b") as file:
                memory = memoryview(mmap.mmap(file.fileno(), num_bytes))
        num_faults = _num_faults()
        answer = read(shards.find(files, were_read_before), memoryview(columns).cast("Q").tolist(), memory)
        send(sys.stdout.buffer, answer)
        if were_read_before and _num_faults() - num_faults > len(answer) * MAX_FAULT_SHARE:
            shards.unmap()


def read(shards: list[memoryview | int], columns: list[int], memory: memoryview) -> bytes:
    """Read records; return which of them were read in full and are those that were packed."""
    count = len(columns) // NUM_COLUMNS
    rows = zip(*(columns[start : start + count] for start in range(0, len(columns), count)), strict=True)
    return bytes(
        _is_right(shards[which], memory[place : place + length], offset, expected)
        for which, offset, place, length, expected in rows
    )


def _is_right(shard: memoryview | int, record: memoryview, offset: int, expected: int) -> bool:
    """Read a record; return whether it was read in full and is the one that was packed."""
    try:
        if isinstance(shard, int):
            os.preadv(shard, [record], offset)
        else:
            record[:] = shard[offset : offset + len(record)]
    except (OSError, ValueError):  # ValueError: the mapping is shorter
        return False
    return checksum(record) == expected


def _num_faults() -> int:
    """Return how many page faults of this process had to wait for a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
