"""The launch record: a file that a launcher keeps fresh, and how its ranks and others read it.

It carries what a rank must be told whatever started it: working folder, environment, and whether to go on, to save and
stop, or to end at once. No signal has to find its way through pdsh, mpirun or srun.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Literal

from nd_dist.errors import DataError
from nd_dist.files import is_running, read_json

BEAT_INTERVAL_S = 2.0
LOOK_INTERVAL_S = 1.0
STALE_LOOKS = 30  # looks of LOOK_INTERVAL_S without a change: counted, so that a suspended machine is no dead launcher
UNREADABLE_LOOKS = 6

Wanted = Literal["run", "stop", "end"]


def launch_record_path(run_dir: Path) -> Path:
    """Return the file that a launcher keeps fresh."""
    return run_dir / ".state" / "launcher.json"


def describe_launcher(run_dir: Path) -> str:
    """Return who works in a run folder, as far as its record says."""
    try:
        record = read_json(launch_record_path(run_dir))
    except (DataError, OSError):  # gone, or another user's
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
        if record["host"] == socket.gethostname() and not is_running(record["pid"]):
            return "end"
        wanted: Wanted = record["wanted"]
        return wanted
