"""Reader processes: they read and check records without holding up the interpreter of the process that trains.

A record of some ten kilobytes is copied and hashed in microseconds. Threads of one interpreter hand it over at every
record, and that costs them more than the work; processes scale as their cores do. The thread that wants records sends
one message a step, waits, and learns which records are right. It reads all others again itself, so that what is wrong
with them is found and said in one place, and a helper that is gone costs time and nothing else.

A helper maps the file that a pool's batches lie in, and opens the shards that its parent has open through ``/proc``.
It ends with its parent: its standard input does.
"""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from shards.checksum import checksum

# NumPy's linear algebra is not used, and would start a thread for every core
_START = """\
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path[:] = {path!r}
from shards.helpers import serve
serve()
"""

TASK_RECORDS = 512  # in one message: no more files are open twice


@dataclass(frozen=True)
class Task:
    """Records to be read.

    Args:
        memory: Path and size of the file that they are written to.
        files: Paths of the shards.
        which: (N,) positions in ``files``.
        offsets: (N,) in the shard.
        places: (N,) in the memory's file.
        lengths: (N,) of the records.
        checksums: (N,) of the records.
    """

    memory: tuple[str, int]
    files: tuple[str, ...]
    which: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64]


def can_help() -> bool:
    """Return whether this system lets a process read its parent's open files."""
    return hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd")


def path_for_helpers(descriptor: int) -> str:
    """Return the path by which a helper opens a file that is open here."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


class Helper:
    """A reader process, started when first asked. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_gone = False

    def read(self, task: Task) -> npt.NDArray[np.bool_]:
        """Return which (N,) records were read and are right; none of them once the process is gone."""
        nothing = np.zeros(len(task.which), dtype=np.bool_)
        if self._is_gone:
            return nothing
        try:
            if self._process is None:
                self._process = _start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            _send(self._process.stdin, task)
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            return nothing
        return np.asarray(answer, dtype=np.bool_)

    def close(self) -> None:
        """End the process."""
        self._is_gone = True
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()
            self._process.wait()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    """Start a process that reads."""
    return subprocess.Popen(
        [sys.executable, "-c", _START.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _send(stream: IO[bytes], message: object) -> None:
    """Write a message."""
    stream.write(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))
    stream.flush()


def serve() -> None:
    """Do tasks from standard input until it ends (runs in the reader process)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent decides
    gc.disable()  # nothing here refers to itself
    memory, content = ("", 0), memoryview(b"")
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if task.memory != memory:
            memory = task.memory
            with open(memory[0], "r+b") as file:
                content = memoryview(mmap.mmap(file.fileno(), memory[1]))
        _send(sys.stdout.buffer, _read(task, content))


def _read(task: Task, memory: memoryview) -> list[bool]:
    """Return which records were read and are right.

    Raises:
        OSError: a shard cannot be opened; the process ends.
    """
    with ExitStack() as stack:
        files = []
        for path in task.files:
            files.append(os.open(path, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        columns = (task.which, task.offsets, task.places, task.lengths, task.checksums)
        return [
            _is_right(files[which], memory[place : place + length], offset, expected)
            for which, offset, place, length, expected in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _is_right(file: int, record: memoryview, offset: int, expected: int) -> bool:
    """Read a record; return whether it was read in full and is the one that was packed."""
    try:
        return os.preadv(file, [record], offset) == len(record) and checksum(record) == expected
    except OSError:
        return False
