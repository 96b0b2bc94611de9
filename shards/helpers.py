"""Reader processes: they read and check records without holding up the interpreter of the process that trains.

A record of some ten kilobytes is copied and hashed in microseconds. Threads of one interpreter hand it over at every
record, and that costs them more than the work; processes scale as their cores do. The thread that wants records sends
one message a step, waits, and learns which records are right. It reads all others again itself, so that what is wrong
with them is found and said in one place, and a helper that is gone costs time and nothing else.

A helper (``shards.helper_process``) maps the file that a pool's batches lie in, and opens the shards that its parent
has open through ``/proc``. It ends with its parent: its standard input does.
"""

from __future__ import annotations

import marshal
import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.helper_process import receive, send

_START = """\
import sys
sys.path[:] = {path!r}
from shards.helper_process import serve
serve()
"""


@dataclass(frozen=True)
class Task:
    """Records to be read.

    Args:
        memory: Descriptor and size of the file that they are written to; a pool's file, which only grows.
        were_read_before: Whether the records are likely to be in memory.
        shards: Identity (of the file, whoever opens it) and descriptor of the shards.
        which: (N,) positions in ``shards``.
        offsets: (N,) in the shard.
        places: (N,) in the memory's file.
        lengths: (N,) of the records.
        checksums: (N,) of the records.
    """

    memory: tuple[int, int]
    were_read_before: bool
    shards: tuple[tuple[tuple[int, int], int], ...]
    which: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64]

    def message(self) -> bytes:
        """Return it as ``helper_process`` takes it."""
        columns = (self.which, self.offsets, self.places, self.lengths, self.checksums)
        content = b"".join(column.astype(np.uint64).data for column in columns)
        return marshal.dumps((self.memory, self.were_read_before, self.shards, content))


def can_help() -> bool:
    """Return whether this system lets a process read its parent's open files."""
    return hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd")


class Helper:
    """A reader process, started when first asked for. For one thread at a time."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._is_ready = self._is_gone = False

    def is_ready(self) -> bool:
        """Return whether it can read; start it where it has not been started, and never wait for it."""
        if not self._is_ready and not self._is_gone:
            try:
                if self._process is None:
                    self._process = _Process()
                if self._process.has_answered():
                    self._process.receive()
                    self._is_ready = True
            except (OSError, EOFError):
                self.close()
        return self._is_ready

    def read(self, task: Task) -> npt.NDArray[np.bool_]:
        """Return which (N,) records were read and are right; none of them once the process is gone."""
        if self._process is not None:
            try:
                self._process.send(task.message())
                return np.frombuffer(self._process.receive(), dtype=np.bool_)
            except (OSError, EOFError):
                self.close()
        return np.zeros(len(task.which), dtype=np.bool_)

    def close(self) -> None:
        """End the process; it is not started again."""
        self._is_ready, self._is_gone = False, True
        if self._process is not None:
            self._process.close()
            self._process = None


class _Process:
    """A process that runs ``helper_process.serve``."""

    def __init__(self) -> None:
        # without the site module, which takes longer than all else: the path is this process's
        path = [str(Path(__file__).parents[1]), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START.format(path=path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._from, select.POLLIN)
        self.pid = self._process.pid

    def has_answered(self) -> bool:
        """Return whether ``receive`` need not wait."""
        return bool(self._poll.poll(0))

    def send(self, message: bytes) -> None:
        """Write a message.

        Raises:
            OSError: the process is gone.
        """
        send(self._to, message)

    def receive(self) -> bytes:
        """Read a message.

        Raises:
            EOFError: the process is gone.
        """
        return receive(self._from)

    def close(self) -> None:
        """End it."""
        for stream in (self._to, self._from):
            with suppress(OSError):
                stream.close()
        self._process.wait()
