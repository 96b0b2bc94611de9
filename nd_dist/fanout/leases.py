"""Claims on shared storage: any number of ranks on any number of hosts share a list of tasks without messages.

A claim on a task is a file ``TASK.GENERATION`` created exclusively; its modification time is the heartbeat. When a
claim grows stale (its rank is dead, frozen, cut off, or hangs in the task) another rank creates the next generation.
Creation is exclusive, so exactly one rank takes over, and no file is ever moved or removed: a claim cannot be lost to
a race between two that take over. The highest generation holds the task. A task's *result* is published once by its
owner (``records``), so that a rank that wakes up late does no harm.

Ages are measured with the file server's clock (the time it gives a file touched now), never with a host's own. A claim
of a process of this very host that no longer exists is stale at once.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_dist.errors import RankFailure
from nd_dist.files import write_error

STALE_S = 30.0
MAX_ATTEMPTS = 3
RELEASED = 0.0  # modification time of a claim that its owner gave back


def process_identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, boot, process namespace, process id, start time."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": _process_space(), "pid": pid, "start": _start_time(pid)}


def _process_space() -> str:
    """Return a text that two processes share only if they see the same process ids; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return a process's start time in clock ticks since boot, an empty text if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Lease:
    """A held claim.

    Args:
        task: Name of the task.
        generation: 0 for the first claim of a task.
        path: The claim's file.
        taken_from: Owner of the generation before, empty where there was none.
    """

    task: str
    generation: int
    path: Path
    taken_from: dict[str, Any]


class LeasePool:
    """Claims tasks in a folder on storage that all ranks see.

    Args:
        folder: Where the claims are.
        launch: Id of this launch; attempts at a task are counted per launch.
        rank: This process's rank, for messages.
        stale_s: Seconds without heartbeat after which a claim is taken over.
        limit_s: Seconds without progress after which a claim is renewed no more: its rank is alive, but hangs in the
            task.
    """

    def __init__(
        self, folder: Path, launch: str, rank: int = 0, stale_s: float = STALE_S, limit_s: float = math.inf
    ) -> None:
        self._folder, self._stale_s, self._limit_s = folder, stale_s, limit_s
        self._progress_at = time.monotonic()
        self._owner = {**process_identity(), "launch": launch, "rank": rank}
        self._clock = folder / f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, task: str) -> Lease | None:
        """Return a lease on the task, None while another rank holds it.

        Raises:
            RankFailure: ranks of this launch have died of this task several times.
        """
        generation = self._newest(task)
        previous: dict[str, Any] = {}
        if generation >= 0:
            path = self._path(task, generation)
            previous = self._read_owner(path)
            if not self._is_stale(path, previous):
                return None
            self._check_attempts(task, generation)
        lease = Lease(task, generation + 1, self._path(task, generation + 1), previous)
        return lease if self._create(lease.path) else None

    def holds(self, lease: Lease) -> bool:
        """Return whether the lease is still ours: nobody has created the next generation."""
        return not self._path(lease.task, lease.generation + 1).exists()

    def release(self, lease: Lease) -> None:
        """Give a task back, so that the next rank that finds it unfinished need not wait."""
        if self.holds(lease):
            os.utime(lease.path, (RELEASED, RELEASED))

    def note_progress(self) -> None:
        """Say that the task which this rank holds goes on."""
        self._progress_at = time.monotonic()

    @contextmanager
    def renewing(self, lease: Lease) -> Iterator[None]:
        """Renew the lease from a thread while the body runs, then release it, however the body ended."""
        self.note_progress()
        stop = threading.Event()
        thread = threading.Thread(target=self._renew, args=(lease, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.release(lease)

    def close(self) -> None:
        """Remove this process's clock file."""
        self._clock.unlink(missing_ok=True)

    def _renew(self, lease: Lease, stop: threading.Event) -> None:
        while not stop.wait(self._stale_s / 4) and self.holds(lease):
            if time.monotonic() - self._progress_at > self._limit_s:
                return
            os.utime(lease.path)

    def _path(self, task: str, generation: int) -> Path:
        return self._folder / f"{task}.{generation:04d}"

    def _newest(self, task: str) -> int:
        """Return the highest generation of a task, -1 where nobody has claimed it."""
        generation = -1
        while self._path(task, generation + 1).exists():
            generation += 1
        return generation

    def _create(self, path: Path) -> bool:
        """Create a claim exclusively; return False where another rank was first."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise write_error(path, error) from error
        try:
            os.write(descriptor, json.dumps(self._owner).encode("utf-8"))
        finally:
            os.close(descriptor)
        return True

    def _read_owner(self, path: Path) -> dict[str, Any]:
        """Return who made a claim; empty while it is being written."""
        try:
            owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, FileNotFoundError):
            return {}
        return owner

    def _is_stale(self, path: Path, owner: dict[str, Any]) -> bool:
        """Return whether a claim's owner is dead or has not renewed it in time."""
        is_neighbour = bool(owner.get("space")) and all(owner[key] == self._owner[key] for key in ("space", "host"))
        if is_neighbour and _start_time(int(owner["pid"])) != owner["start"]:
            return True
        try:
            return self._server_time() - path.stat().st_mtime >= self._stale_s
        except FileNotFoundError:
            return False

    def _server_time(self) -> float:
        """Return the file server's time."""
        self._clock.touch()
        os.utime(self._clock)
        return self._clock.stat().st_mtime

    def _check_attempts(self, task: str, newest: int) -> None:
        """Refuse a task that keeps killing ranks of this launch."""
        claims = [self._path(task, generation) for generation in range(newest + 1)]
        owners = [self._read_owner(path) for path in claims if path.stat().st_mtime != RELEASED]
        mine = [owner for owner in owners if owner.get("launch") == self._owner["launch"]]
        if len(mine) >= MAX_ATTEMPTS:
            last = mine[-1]
            raise RankFailure(
                f"{len(mine)} ranks died, stopped or took too long while they worked on the same unit.",
                where=f"unit {task}; last: rank {last.get('rank')} on {last.get('host')}",
                todo="look into that rank's log; if memory ran out, use a smaller evaluation.num_repeats; "
                "if one unit takes longer than launch.silence_s, raise that",
            )
