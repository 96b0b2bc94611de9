"""Claims on shared storage: any number of ranks on any number of hosts share the tasks of a phase without messages.

A claim on a task is a file ``TASK.GENERATION`` created exclusively; its modification time is the heartbeat. Where a
heartbeat stands still (its rank is dead, frozen, cut off, or hangs in the task) another rank creates the next
generation: exactly one takes over. A task that has a result has a file ``TASK.done``, so that one listing of the
folder says what every rank is at. A task's *result* is published once by its owner (``results``), so that a rank that
wakes up late does no harm; every launch has claims of its own, and they are worth nothing afterwards.

Whether a heartbeat stands still is measured with the watching rank's own clock, from look to look: neither a host's
clock nor the file server's has to be right.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_dist.errors import RankFailure
from nd_dist.files import write_error

STALE_S = 30.0
MAX_ATTEMPTS = 3
DONE = "done"


@dataclass(frozen=True)
class Lease:
    """A held claim.

    Args:
        task: Name of the task.
        path: The claim's file.
        taken_from: Owner of the generation before, empty where there was none.
    """

    task: str
    path: Path
    taken_from: Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """What a listing of the claims says.

    Args:
        done: Tasks that have a result.
        held: Task -> newest generation of its claims.
    """

    done: frozenset[str]
    held: Mapping[str, int]


class LeasePool:
    """Claims tasks in a folder on storage that all ranks see.

    Args:
        folder: Where the claims of this launch and phase are.
        rank: This process's rank, for messages.
        stale_s: Seconds for which a heartbeat may stand still.
        limit_s: Seconds without progress after which a claim is renewed no more: its rank is alive, but hangs in the
            task.
    """

    def __init__(self, folder: Path, rank: int = 0, stale_s: float = STALE_S, limit_s: float = math.inf) -> None:
        self.stale_s = stale_s
        self._folder, self._limit_s = folder, limit_s
        self._progress_at = time.monotonic()
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "rank": rank}
        self._seen: dict[str, tuple[float, float]] = {}  # claim -> its heartbeat, and when it was first seen like that
        folder.mkdir(parents=True, exist_ok=True)

    def look(self) -> Look:
        """Return what every rank is at."""
        done, held = set(), dict[str, int]()
        for name in os.listdir(self._folder):
            task, _, kind = name.rpartition(".")
            if kind == DONE:
                done.add(task)
            else:
                held[task] = max(held.get(task, 0), int(kind))
        return Look(frozenset(done), held)

    def are_done(self, tasks: Sequence[str]) -> bool:
        """Return whether some tasks have results."""
        return not tasks or self.look().done.issuperset(tasks)

    def changed_at(self) -> int:
        """Return when a claim was last made or a task done, in the file server's time; one question to it."""
        return self._folder.stat().st_mtime_ns

    def claim(self, task: str) -> Lease | None:
        """Return a lease on a task that nobody has claimed yet, None where another rank was first."""
        return self._create(task, 0, {})

    def take_over(self, task: str, generation: int) -> Lease | None:
        """Return a lease on a task whose newest claim's heartbeat stands still, otherwise None.

        Raises:
            RankFailure: ranks of this launch have died of this task several times.
        """
        path = self._path(task, generation)
        with open(path, encoding="utf-8") as stream:  # opened before it is asked for: NFS then looks at the server
            beat, text = os.fstat(stream.fileno()).st_mtime, stream.read()
        now = time.monotonic()
        known, since = self._seen.get(path.name, (math.nan, now))
        self._seen[path.name] = (beat, since if beat == known else now)
        if beat != known or now - since < self.stale_s:
            return None
        owner: dict[str, Any] = json.loads(text or "{}")
        if generation + 1 >= MAX_ATTEMPTS:
            raise RankFailure(
                f"{generation + 1} ranks died, stopped or took too long while they worked on the same unit.",
                where=f"unit {task}; last: rank {owner.get('rank')} on {owner.get('host')}",
                todo="look into that rank's log; if memory ran out, use a smaller evaluation.num_repeats; "
                "if one unit takes longer than launch.silence_s, raise that",
            )
        return self._create(task, generation + 1, owner)

    def finish(self, task: str) -> None:
        """Say that a task has a result."""
        with suppress(FileExistsError):
            self._write(self._folder / f"{task}.{DONE}", "")

    def note_progress(self) -> None:
        """Say that the task which this rank holds goes on."""
        self._progress_at = time.monotonic()

    @contextmanager
    def renewing(self, lease: Lease) -> Iterator[None]:
        """Renew the lease from a thread while the body runs."""
        self.note_progress()
        stop = threading.Event()
        thread = threading.Thread(target=self._renew, args=(lease, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _renew(self, lease: Lease, stop: threading.Event) -> None:
        while not stop.wait(self.stale_s / 4) and time.monotonic() - self._progress_at <= self._limit_s:
            os.utime(lease.path)

    def _path(self, task: str, generation: int) -> Path:
        return self._folder / f"{task}.{generation:04d}"

    def _create(self, task: str, generation: int, taken_from: Mapping[str, Any]) -> Lease | None:
        """Create a claim exclusively; return None where another rank was first."""
        path = self._path(task, generation)
        try:
            self._write(path, json.dumps(self._owner))
        except FileExistsError:
            return None
        return Lease(task, path, taken_from)

    def _write(self, path: Path, text: str) -> None:
        """Write a file that does not exist.

        Raises:
            FileExistsError: it does.
        """
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(text)
        except FileExistsError:
            raise
        except OSError as error:
            raise write_error(path, error) from error
