"""Who is alive: the launcher's heartbeat, and locks that the kernel drops when their holder dies.

One launcher works in a run folder at a time; its ranks end when it is gone, also after kill -9 and on other hosts.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from pathlib import Path

from nd_dist.errors import DataError, WorldError
from nd_dist.files import read_json, write_json

BEAT_INTERVAL_S = 2.0
STALE_AFTER_S = 30.0
RANKS_GONE_WITHIN_S = 60.0


def _state_dir(run_dir: Path) -> Path:
    """Return the folder of the liveness files."""
    path = run_dir / ".state"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _lock(path: Path, kind: int, wait_s: float) -> int | None:
    """Return a descriptor that holds a lock of ``kind`` on ``path``, None if others kept it for ``wait_s``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.2)


def hold_rank_lock(run_dir: Path) -> int:
    """Take the shared lock that says "a rank works here"; it goes with the process.

    Raises:
        WorldError: a launcher holds the folder exclusively (a rank of a launch that was given up).
    """
    descriptor = _lock(_state_dir(run_dir) / "ranks.lock", fcntl.LOCK_SH, wait_s=5.0)
    if descriptor is None:
        raise WorldError("Another launch owns this run folder.", where=str(run_dir))
    return descriptor


class RunFolder:
    """The launcher's hold on a run folder: an exclusive lock, and a heartbeat that its ranks watch.

    Args:
        run_dir: Folder of the run.
        launch_id: This launch.

    Raises:
        WorldError: another launcher works in the folder, or ranks of an earlier one do not end.
    """

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        state = _state_dir(run_dir)
        self._lock = _lock(state / "launcher.lock", fcntl.LOCK_EX, wait_s=1.0)
        if self._lock is None:
            raise WorldError(
                "Another command works in this run folder.",
                where=str(run_dir),
                todo="wait for it, stop it, or choose another run_dir=",
            )
        leftover = _lock(state / "ranks.lock", fcntl.LOCK_EX, wait_s=RANKS_GONE_WITHIN_S)
        if leftover is None:
            raise WorldError(
                "Ranks of an earlier launch still run in this run folder.",
                where=str(run_dir),
                todo="end them (their pids stand in events/*.jsonl, event rank_start)",
            )
        os.close(leftover)
        self._path = state / "launcher.json"
        self._launch_id = launch_id
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._beat_forever, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        write_json(self._path, {"launch": self._launch_id, "host": socket.gethostname(), "pid": os.getpid()})

    def _beat_forever(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            os.utime(self._path)

    def release(self) -> None:
        """End the heartbeat and give the folder back."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Heartbeat:
    """A rank's view of its launcher: on the same host by process id as well, anywhere by the heartbeat file's changes.

    Args:
        run_dir: Folder of the run.
        launch_id: The launch that started this rank.
    """

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        self._path = run_dir / ".state" / "launcher.json"
        self._launch_id = launch_id
        self._changed = time.monotonic()
        self._mtime = 0.0

    def is_alive(self) -> bool:
        """Whether the launcher of this rank still works."""
        try:
            mtime = self._path.stat().st_mtime
            record = read_json(self._path)
        except (OSError, DataError):  # given back, or a moment of a network file system: believe it after a while
            return time.monotonic() - self._changed < 3 * BEAT_INTERVAL_S
        if record["launch"] != self._launch_id:
            return False
        if mtime != self._mtime:
            self._mtime, self._changed = mtime, time.monotonic()
        if record["host"] == socket.gethostname() and not _process_runs(record["pid"]):
            return False
        return time.monotonic() - self._changed < STALE_AFTER_S


def _process_runs(pid: int) -> bool:
    """Whether a process of this host exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
