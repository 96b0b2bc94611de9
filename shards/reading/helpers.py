"""Reader processes: they read and check records without holding up the interpreter of the process that trains.

A record of some ten kilobytes is copied and hashed in microseconds. Threads of one interpreter hand it over at every
record, and that costs them more than the work; processes scale as their cores do. The thread that wants records sends
a message a step, or some where they lie in many shards, waits, and learns which records are right. It reads all others
again itself, so that what is wrong with them is found and said in one place, and a helper that is gone costs time and
nothing else.

A helper (``shards.reading.helper_process``) maps the file that a pool's batches lie in, and opens the shards that its
parent has open through ``/proc``. It ends with its parent.
"""

from __future__ import annotations

import logging
import marshal
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.reading.helper_process import Identity, receive, send

_LOGGER = logging.getLogger(__name__)
_MAX_LOST = 3  # helpers; then the threads read
_START = """\
import sys
sys.path[:] = {path!r}
from shards.reading.helper_process import serve
serve({folder!r})
"""


@dataclass(frozen=True)
class Task:
    """Records to be read.

    Args:
        memory: Identity, descriptor and size of the file that they are written to; a pool's file, which only grows.
        shards: Identity and descriptor of the shards.
        which: (N,) positions in ``shards``.
        offsets: (N,) in the shard.
        places: (N,) in the memory's file.
        lengths: (N,) of the records.
        checksums: (N,) of the records.
        were_read: (N,) whether the records were read before and are likely to be in memory.
    """

    memory: tuple[Identity, int, int]
    shards: tuple[tuple[Identity, int], ...]
    which: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64]
    were_read: npt.NDArray[np.bool_]

    def message(self) -> bytes:
        """Return it as ``helper_process`` takes it."""
        columns = (self.which, self.offsets, self.places, self.lengths, self.checksums, self.were_read)
        return marshal.dumps((self.memory, self.shards, b"".join(column.astype(np.uint64).data for column in columns)))


@dataclass(frozen=True)
class Answer:
    """How a task ended.

    Args:
        is_right: (N,) which records were read and are right.
        is_missing: Whether records that were read before are not in memory any more.
    """

    is_right: npt.NDArray[np.bool_]
    is_missing: bool


def can_help() -> bool:
    """Return whether this system lets a process read its parent's open files."""
    return hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd")


class Helper:
    """A reader process, started when first asked for. For one thread at a time."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._is_ready = self.is_gone = False

    def is_ready(self) -> bool:
        """Return whether it can read; start it where it has not been started, and never wait for it."""
        if not self._is_ready and not self.is_gone:
            try:
                if self._process is None:
                    self._process = _Process()
                if self._process.has_answered():
                    self._process.receive()
                    self._is_ready = True
            except (OSError, EOFError) as error:
                self._lose(error)
        return self._is_ready

    def read(self, task: Task) -> Answer:
        """Read records; none of them are right once the process is gone."""
        count = len(task.which)
        if self._is_ready and self._process is not None:
            try:
                self._process.send(task.message())
                answer = self._process.receive()
                if len(answer) == count + 1:
                    return Answer(np.frombuffer(answer, dtype=np.bool_, count=count), bool(answer[count]))
                raise EOFError
            except (OSError, EOFError) as error:
                self._lose(error)
            except BaseException:  # an answer may be outstanding, and must not be taken for that of another task
                self.close()
                raise
        return Answer(np.zeros(count, dtype=np.bool_), is_missing=False)

    def close(self) -> None:
        """End the process; it is not started again."""
        self._is_ready, self.is_gone = False, True
        if self._process is not None:
            self._process.close()
            self._process = None

    def _lose(self, error: Exception) -> None:
        """Close it, and say that it was lost."""
        cause = repr(error) if self._process is None else f"exit code {self._process.exit_code()}"
        self.close()
        _LOGGER.warning("A reader process was lost (%s); what it should have read is read without it.", cause)


class Helpers:
    """The reader processes of a stream, one for each thread that asks at the same time; thread-safe."""

    def __init__(self) -> None:
        self._idle: list[Helper] = []
        self._num_lost = 0
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Helper | None]:
        """Lend one that is ready; none where it has not started yet or too many were lost."""
        with self._lock:
            if self._num_lost >= _MAX_LOST:
                helper = None
            else:
                helper = self._idle.pop() if self._idle else Helper()
        try:
            yield helper if helper and helper.is_ready() else None
        finally:
            if helper:
                self._give_back(helper)

    def close(self) -> None:
        """End all that nobody uses."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def _give_back(self, helper: Helper) -> None:
        """Keep a helper for the next who asks; give up all where too many were lost."""
        with self._lock:
            if helper.is_gone:
                self._num_lost += 1
                if self._num_lost == _MAX_LOST:
                    _LOGGER.warning("%d reader processes were lost: from now on the threads read.", _MAX_LOST)
            else:
                self._idle.append(helper)
            is_given_up = self._num_lost >= _MAX_LOST
        if is_given_up:
            self.close()


class _Process:
    """A process that runs ``helper_process.serve``.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        # without the site module, which takes longer than all else: the path is this process's
        path = [*sys.path, str(Path(__file__).parents[2])]
        folder = f"/proc/{os.readlink('/proc/self')}/fd"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START.format(path=path, folder=folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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

    def exit_code(self) -> int:
        """End it and return its exit code, a negative signal where one ended it."""
        with suppress(subprocess.TimeoutExpired):  # it ended by itself a moment ago
            self._process.wait(1)
        self.close()
        return self._process.wait()

    def close(self) -> None:
        """End it: it holds nothing that could be lost."""
        self._process.kill()
        for stream in (self._to, self._from):
            with suppress(OSError):
                stream.close()
        self._process.wait()
