"""Who is alive and what is wanted: the launcher's heartbeat file, and locks that the kernel drops with their holder.

One launcher works in a run folder at a time; its ranks end when it is gone, also after kill -9 and on other hosts.
The heartbeat file also carries what a rank must be told whatever started it: working folder, environment, and whether
to go on, to save and stop, or to end at once. No signal has to find its way through pdsh, mpirun or srun.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nd_dist.errors import DataError, WorldError
from nd_dist.files import read_json, write_json

BEAT_INTERVAL_S = 2.0
LOOK_INTERVAL_S = 1.0
STALE_LOOKS = 30  # looks of LOOK_INTERVAL_S without a change: counted, so that a suspended machine is no dead launcher
UNREADABLE_LOOKS = 6
RANKS_GONE_WITHIN_S = 60.0

Wanted = Literal["run", "stop", "end"]


def state_dir(run_dir: Path) -> Path:
    """Return the folder of the liveness files."""
    path = run_dir / ".state"
    path.mkdir(parents=True, exist_ok=True)
    return path


def launch_record_path(run_dir: Path) -> Path:
    """Return the file that a launcher keeps fresh."""
    return run_dir / ".state" / "launcher.json"


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
    descriptor = _lock(state_dir(run_dir) / "ranks.lock", fcntl.LOCK_SH, wait_s=5.0)
    if descriptor is None:
        raise WorldError("Another launch owns this run folder.", where=str(run_dir))
    return descriptor


class RunFolder:
    """The launcher's hold on a run folder: an exclusive lock, and a heartbeat that its ranks watch.

    Args:
        run_dir: Folder of the run.
        launch_id: This launch.
        env: Variables that every rank is given.

    Raises:
        WorldError: another launcher works in the folder, or ranks of an earlier one do not end.
    """

    def __init__(self, run_dir: Path, launch_id: str, env: Mapping[str, str] | None = None) -> None:
        state = state_dir(run_dir)
        self._lock = _lock(state / "launcher.lock", fcntl.LOCK_EX, wait_s=1.0)
        if self._lock is None:
            raise WorldError(
                "Another command works in this run folder.",
                where=str(run_dir),
                found=describe_launcher(run_dir),
                todo="wait for it, stop it, or choose another run_dir=",
            )
        leftover = _lock(state / "ranks.lock", fcntl.LOCK_EX, wait_s=RANKS_GONE_WITHIN_S)
        if leftover is None:
            raise WorldError(
                "Ranks of an earlier launch still run in this run folder.",
                where=str(run_dir),
                todo="end them (their hosts and pids stand in events/*.jsonl, event rank_start)",
            )
        os.close(leftover)
        self._path = launch_record_path(run_dir)
        self._record: dict[str, Any] = {
            "launch": launch_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "cwd": os.getcwd(),
            "env": dict(env or {}),
            "wanted": "run",
        }
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self.tell("run")
        self._thread = threading.Thread(target=self._beat_forever, daemon=True)
        self._thread.start()

    def tell(self, wanted: Wanted) -> None:
        """Say what the ranks shall do from now on."""
        with self._writing:
            self._record["wanted"] = wanted
            write_json(self._path, self._record)

    def _beat_forever(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            with self._writing:
                os.utime(self._path)

    def release(self) -> None:
        """End the heartbeat and give the folder back."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def describe_launcher(run_dir: Path) -> str:
    """Return who works in a run folder, as far as its record says."""
    try:
        record = read_json(launch_record_path(run_dir))
    except DataError:
        return "unknown"
    return f"launch {record['launch']} (pid {record['pid']} on {record['host']})"


class Heartbeat:
    """A rank's view of its launcher: on the same host by process id as well, anywhere by the heartbeat file's changes.

    Args:
        run_dir: Folder of the run.
        launch_id: The launch that started this rank.
    """

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        self._path = launch_record_path(run_dir)
        self._launch_id = launch_id
        self._looks_unchanged = 0
        self._looks_unreadable = 0
        self._mtime = 0.0

    def look(self) -> Wanted:
        """Return what the launcher wants; ``end`` when it is gone. Called every ``LOOK_INTERVAL_S``."""
        try:
            with open(self._path, encoding="utf-8") as stream:  # opening makes a network file system ask its server
                mtime = os.fstat(stream.fileno()).st_mtime
                record = json.load(stream)
        except (OSError, json.JSONDecodeError):  # given back, or a moment of a network file system
            self._looks_unreadable += 1
            return "end" if self._looks_unreadable > UNREADABLE_LOOKS else "run"
        self._looks_unreadable = 0
        self._looks_unchanged = 0 if mtime != self._mtime else self._looks_unchanged + 1
        self._mtime = mtime
        if record["launch"] != self._launch_id or self._looks_unchanged > STALE_LOOKS:
            return "end"
        if record["host"] == socket.gethostname() and not _process_runs(record["pid"]):
            return "end"
        wanted: Wanted = record["wanted"]
        return wanted


def _process_runs(pid: int) -> bool:
    """Whether a process of this host exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
