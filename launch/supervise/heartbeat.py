"""The launch record: a file that a launcher keeps fresh, and how its ranks and others read it.

It carries what a rank must be told whatever started it: working folder, environment, and whether to go on, to save and
stop, or to end at once. No signal has to find its way through pdsh, mpirun or srun.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

from nd_dist.errors import DataError
from nd_dist.files import is_running, read_json

BEAT_INTERVAL_S = 2.0
LOOK_INTERVAL_S = 1.0
STALE_LOOKS = 30  # looks of LOOK_INTERVAL_S without a change: counted, so that a suspended machine is no dead launcher
UNREADABLE_LOOKS = 6
READS_PER_S, MOST_LOOKS_PER_READ = 100, 5  # all ranks together: a shared file system has better things to do

Wanted = Literal["run", "stop", "end"]


def launch_record_path(run_dir: Path) -> Path:
    """Return the file that a launcher keeps fresh."""
    return run_dir / ".state" / "launcher.json"


def pids_of() -> str:
    """Return where this process's ids count: its host, and its namespace there (a container has one of its own)."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def describe_launcher(run_dir: Path) -> str:
    """Return who works in a run folder, as far as its record says."""
    try:
        record = read_json(launch_record_path(run_dir))
    except DataError:
        return "unknown"
    return f"launch {record['launch']} (pid {record['pid']} on {record['host']})"


class Heartbeat:
    """A rank's view of its launcher: by process id where it can see that, anywhere by the heartbeat file's changes.

    Args:
        run_dir: Folder of the run.
        launch_id: The launch that started this rank.
        ranks: How many ranks look at the file: the more, the less often each of them opens it.
    """

    def __init__(self, run_dir: Path, launch_id: str, ranks: int = 1) -> None:
        self._path = launch_record_path(run_dir)
        self._launch_id = launch_id
        self._looks_per_read = min(max(1, ranks // READS_PER_S), MOST_LOOKS_PER_READ)
        self._looks = self._looks_unchanged = self._looks_unreadable = 0
        self._mtime = 0.0
        self._record: dict[str, Any] = {}  # Any: JSON

    def look(self) -> Wanted:
        """Return what the launcher wants; ``end`` when it is gone. Called every ``LOOK_INTERVAL_S``."""
        if self._looks % self._looks_per_read == 0:
            self._read()
        self._looks += 1
        if self._looks_unreadable > UNREADABLE_LOOKS or self._looks_unchanged > STALE_LOOKS:
            return "end"
        if not self._record:
            return "run"
        if self._record["launch"] != self._launch_id:
            return "end"
        if self._record["pids_of"] == pids_of() and not is_running(self._record["pid"]):
            return "end"
        wanted: Wanted = self._record["wanted"]
        return wanted

    def _read(self) -> None:
        """Read the file; opening it makes a network file system ask its server."""
        try:
            with open(self._path, encoding="utf-8") as stream:
                mtime = os.fstat(stream.fileno()).st_mtime
                self._record = json.load(stream)
        except (OSError, json.JSONDecodeError):  # given back, or a moment of a network file system
            self._looks_unreadable += self._looks_per_read
            return
        self._looks_unreadable = 0
        self._looks_unchanged = 0 if mtime != self._mtime else self._looks_unchanged + self._looks_per_read
        self._mtime = mtime
