"""The launch record: a file that a launcher keeps fresh, and how its ranks and others read it.

It carries what a rank must be told whatever started it: working folder, environment, and whether to go on, to save and
stop, or to end at once. No signal has to find its way through pdsh, mpirun or srun. A second file takes what others
(`nd stop`, on any host) ask of the launcher, and stays: a launch that was asked to stop did not fail.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Literal, get_args

from nd_dist.errors import DataError
from nd_dist.files import is_running, read_json, write_json

BEAT_INTERVAL_S = 2.0
LOOK_INTERVAL_S = 1.0
STALE_LOOKS = 30  # looks of LOOK_INTERVAL_S without a change: counted, so that a suspended machine is no dead launcher
UNREADABLE_LOOKS = 6
READS_PER_S, MOST_LOOKS_PER_READ = 100, 5  # all ranks together: a shared file system has better things to do
STALE_S = STALE_LOOKS * LOOK_INTERVAL_S

Wanted = Literal["run", "stop", "end"]
WISHES: tuple[Wanted, ...] = get_args(Wanted)
"""From the mildest on; a launch never goes back to a milder one."""
Record = dict[str, Any]  # Any: JSON


def launch_record_path(run_dir: Path) -> Path:
    """Return the file that a launcher keeps fresh."""
    return run_dir / ".state" / "launcher.json"


def request_path(run_dir: Path) -> Path:
    """Return the file that takes what others ask of the launcher."""
    return run_dir / ".state" / "request.json"


def describe_launcher(run_dir: Path) -> str:
    """Return who works in a run folder, as far as its record says."""
    record = read_record(launch_record_path(run_dir))
    return f"launch {record['launch']} (pid {record['pid']} on {record['host']})" if record else "unknown"


def running_launch(run_dir: Path, now: float) -> Record:
    """Return the record of the launch that works in a run folder; empty where none does.

    Args:
        run_dir: Folder of the run.
        now: Seconds, the clock of the files; a record that was not kept fresh is that of a launcher that is gone.
    """
    path = launch_record_path(run_dir)
    record = read_record(path)
    try:
        is_fresh = now - path.stat().st_mtime < STALE_S
    except OSError:
        return {}
    return record if is_fresh and record and not has_died_here(record) else {}


def process_identity() -> Record:
    """Return what tells this process from all others: its number, and where it is counted."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux: one numbering per machine
        namespace = ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_namespace": namespace}


def has_died_here(record: Record) -> bool:
    """Return whether a launcher is known to be gone: its number was given out where this process has its own."""
    own = process_identity()
    is_here = all(record.get(name) == own[name] for name in ("host", "pid_namespace"))
    return is_here and not is_running(record["pid"])


def ask_launcher(run_dir: Path, launch_id: str, wanted: Wanted) -> None:
    """Ask the launcher of a launch, on whatever host, for something."""
    write_json(request_path(run_dir), {"launch": launch_id, "wanted": wanted})


def asked_of_launcher(run_dir: Path, launch_id: str) -> Wanted:
    """Return what was asked of a launch so far."""
    request = read_record(request_path(run_dir))
    wanted: Wanted = request["wanted"] if request and request["launch"] == launch_id else "run"
    return wanted


def read_record(path: Path) -> Record:
    """Return a record; empty while there is none that can be read."""
    try:
        record: Record = read_json(path)
    except (DataError, OSError):
        return {}
    return record


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
        self._record: Record = {}

    def look(self) -> Wanted:
        """Return what the launcher wants; ``end`` when it is gone. Called every ``LOOK_INTERVAL_S``."""
        if self._looks % self._looks_per_read == 0:
            self._take_in()
        self._looks += 1
        if self._looks_unreadable > UNREADABLE_LOOKS or self._looks_unchanged > STALE_LOOKS:
            return "end"
        if not self._record:
            return "run"
        if self._record["launch"] != self._launch_id or has_died_here(self._record):
            return "end"
        wanted: Wanted = self._record["wanted"]
        return wanted

    def _take_in(self) -> None:
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
