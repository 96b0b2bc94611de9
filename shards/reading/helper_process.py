"""What a reader process runs: it does tasks from standard input until that ends, and says which records are right.

Nothing but the standard library, the checksum and the limit of open files is imported: it starts in some 20 ms.

Every message is its length (8 bytes) and its content. A task is marshalled: identity, descriptor and size of the
memory's file, identity and descriptor of every shard (the parent's descriptors), and one buffer of 64-bit columns with
a number a record each: position among the shards, offset there, place in the memory, length, checksum, 1 where it was
read before. The answer has one byte a record, 1 where it is right, and a last one, 1 where what was read before is not
in memory any more. The very first answer is empty: the process is ready.

What was read before is copied from a mapping of its shard, which costs half of what a system call costs (the pages are
not looked up again). All pages that a process touches count as its own in what ``top`` shows, although they are the
page cache's and shared, so there is a limit.
"""

from __future__ import annotations

import gc
import marshal
import mmap
import os
import resource
import select
import signal
import sys
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import IO

from shards.format.checksum import checksum
from shards.reading.open_files import max_open_shards

Identity = tuple[int, int]
"""Device and number of a file, whoever opens it."""

NUM_COLUMNS = 6
MAX_MAPPED_SHARE = 1 / 64  # of the machine's memory
MAX_FAULT_SHARE = 1 / 8  # page faults that waited for a disk, of the records of a task
CHECK_PARENT_MS = 2000


class Shard:
    """An open file, which is mapped where that pays.

    Args:
        descriptor: Of the file; this object closes it.
        num_bytes: Size of the file.
        may_map: Whether it may be mapped.
    """

    def __init__(self, descriptor: int, num_bytes: int, may_map: bool) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        self.num_reserved_bytes = num_bytes if may_map else 0
        self._may_map = may_map
        self.mapping: memoryview | None = None

    def read(self, offset: int, record: memoryview, was_read: bool) -> None:
        """Fill ``record`` with what lies at an offset; a file that ends early leaves it filled in part.

        Raises:
            OSError: it cannot be read.
            ValueError: the mapping ends early.
        """
        if was_read and (mapping := self.mapping or self._map()):
            record[:] = mapping[offset : offset + len(record)]
        else:
            os.preadv(self.descriptor, [record], offset)

    def close(self) -> None:
        """Unmap and close the file."""
        self.mapping = None
        os.close(self.descriptor)

    def _map(self) -> memoryview | None:
        """Map the file where it may and can be."""
        if self._may_map:
            try:
                mapping = mmap.mmap(self.descriptor, self.num_bytes, prot=mmap.PROT_READ)
                mapping.madvise(mmap.MADV_RANDOM)  # else the system may read megabytes around a missing page
            except (OSError, ValueError):  # some file systems cannot
                self._may_map = False
                return None
            self.mapping = memoryview(mapping)
        return self.mapping


class Shards:
    """Open shards by their identity; the least recently used is closed first, and one that was deleted soon.

    Args:
        folder: Holds the files that the parent has open, by descriptor.
        max_open: Shards kept open.
        mappable_bytes: How much may be mapped.
    """

    def __init__(self, folder: str, max_open: int, mappable_bytes: int) -> None:
        self._folder, self._max_open, self._mappable_bytes = folder, max_open, mappable_bytes
        self._open: OrderedDict[Identity, Shard] = OrderedDict()

    def find(self, wanted: Sequence[tuple[Identity, int]]) -> list[Shard | None]:
        """Return shards, open until the next call; none in place of one that cannot be opened."""
        descriptors = dict(wanted)
        new = [identity for identity in descriptors if identity not in self._open]
        if new:
            self._close_some(len(new), descriptors.keys())
        for identity in new:
            with suppress(OSError):
                self._open[identity] = self._open_shard(identity, descriptors[identity])
        for identity in descriptors.keys() & self._open.keys():
            self._open.move_to_end(identity)
        return [self._open.get(identity) for identity, _ in wanted]

    def unmap(self) -> None:
        """Unmap all."""
        for shard in self._open.values():
            shard.mapping = None

    def _open_shard(self, identity: Identity, descriptor: int) -> Shard:
        own = open_there(self._folder, identity, descriptor, os.O_RDONLY)
        num_bytes = os.fstat(own).st_size
        shard = Shard(own, num_bytes, may_map=num_bytes <= self._mappable_bytes)
        self._mappable_bytes -= shard.num_reserved_bytes
        return shard

    def _close_some(self, num_new: int, in_use: Collection[Identity]) -> None:
        """Close those beyond the limit, and deleted ones: a cache that evicts its files wants their space."""
        num_beyond = len(self._open) + num_new - self._max_open
        for identity in [identity for identity in self._open if identity not in in_use]:
            if num_beyond > 0 or _is_deleted(self._open[identity].descriptor):
                shard = self._open.pop(identity)
                self._mappable_bytes += shard.num_reserved_bytes
                shard.close()
                num_beyond -= 1


def _is_deleted(descriptor: int) -> bool:
    """Return whether an open file has no name any more."""
    try:
        return os.fstat(descriptor).st_nlink == 0
    except OSError:  # a network file system that has lost it
        return True


def open_there(folder: str, identity: Identity, descriptor: int, flags: int) -> int:
    """Return a descriptor of a file that the parent has open.

    Raises:
        OSError: it cannot be opened, or is another file.
    """
    own = os.open(f"{folder}/{descriptor}", flags)
    status = os.fstat(own)
    if (status.st_dev, status.st_ino) != identity:
        os.close(own)
        raise OSError("the parent's file is another one")
    return own


def send(stream: IO[bytes], message: bytes) -> None:
    """Write a message.

    Raises:
        OSError: nobody reads it.
    """
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


def serve(folder: str) -> None:
    """Do tasks until standard input ends or the parent is gone.

    Args:
        folder: Holds the files that the parent has open, by descriptor.

    Raises:
        OSError: the memory cannot be opened; the process ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # sent to whole groups; the parent decides
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # nothing here refers to itself
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shards = Shards(folder, max_open_shards(), int(machine_bytes * MAX_MAPPED_SHARE))
    memory, parent = memoryview(b""), os.getppid()
    with suppress(EOFError, BrokenPipeError):
        send(sys.stdout.buffer, b"")
        while _wait_for_task(parent):
            (identity, descriptor, num_bytes), wanted, columns = marshal.loads(receive(sys.stdin.buffer))
            if len(memory) != num_bytes:  # it only grows
                file = open_there(folder, identity, descriptor, os.O_RDWR)
                memory = memoryview(mmap.mmap(file, num_bytes))
                os.close(file)
            num_faults = _num_faults()
            answer = read(shards.find(wanted), memoryview(columns).cast("Q").tolist(), memory)
            is_missing = _num_faults() - num_faults > len(answer) * MAX_FAULT_SHARE
            send(sys.stdout.buffer, answer + bytes([is_missing]))
            if is_missing:
                shards.unmap()  # a page fault reads four kilobytes where a system call reads a record


def read(shards: list[Shard | None], columns: list[int], memory: memoryview) -> bytes:
    """Read records; return which of them were read in full and are those that were packed."""
    count = len(columns) // NUM_COLUMNS
    rows = zip(*(columns[start : start + count] for start in range(0, len(columns), count)), strict=True)
    return bytes(
        _is_right(shards[which], offset, memory[place : place + length], expected, was_read)
        for which, offset, place, length, expected, was_read in rows
    )


def _is_right(shard: Shard | None, offset: int, record: memoryview, expected: int, was_read: bool) -> bool:
    """Read a record; return whether it is the one that was packed."""
    if shard is None:
        return False
    try:
        shard.read(offset, record, was_read)
    except (OSError, ValueError):
        return False
    return checksum(record) == expected


def _wait_for_task(parent: int) -> bool:
    """Wait until standard input has a message or ends; return false where the parent is gone.

    A process that the parent forked may keep the other end of standard input open.
    """
    poll = select.poll()
    poll.register(sys.stdin.buffer, select.POLLIN)
    while not poll.poll(CHECK_PARENT_MS):
        if os.getppid() != parent:
            return False
    return True


def _num_faults() -> int:
    """Return how many page faults of this process had to wait for a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
