"""Who may work in a run folder: locks that the kernel drops with their holder, also after kill -9.

One launcher works in a run folder at a time, and a new one waits until the ranks of the last have let go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.supervise.heartbeat import (
    BEAT_INTERVAL_S,
    WISHES,
    Wanted,
    ask_launcher,
    asked_of_launcher,
    describe_launcher,
    launch_record_path,
    process_identity,
)
from launch.supervise.stop import StopSignal
from nd_dist.errors import StorageError, WorldError
from nd_dist.files import atomic_path, json_text

RANKS_GONE_WITHIN_S = 60.0


def state_dir(run_dir: Path) -> Path:
    """Return the folder of the locks and of the launch record."""
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
    descriptor = _lock(state_dir(run_dir) / "ranks.lock", fcntl.LOCK_SH, wait_s=5.0)
    if descriptor is None:
        raise WorldError("Another launch owns this run folder.", where=str(run_dir))
    return descriptor


class RunFolder:
    """The launcher's hold on a run folder: an exclusive lock, and a heartbeat that its ranks watch.

    What others ask of the launch (`nd stop`) is passed on to the ranks, and to ``stop``.

    Args:
        run_dir: Folder of the run.
        launch_id: This launch.
        env: Variables that every rank is given.
        size: Ranks of the launch; 0: it has none of its own.

    Raises:
        WorldError: another launcher works in the folder, or ranks of an earlier one do not end.
    """

    def __init__(self, run_dir: Path, launch_id: str, env: Mapping[str, str] | None = None, size: int = 0) -> None:
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
                todo="end them (events/*.jsonl lists their hosts and pids: event rank_start)",
            )
        os.close(leftover)
        self._run_dir, self._path, self.stop = run_dir, launch_record_path(run_dir), StopSignal()
        self._record: dict[str, Any] = {
            **process_identity(),
            "launch": launch_id,
            "cwd": os.getcwd(),
            "env": dict(env or {}),
            "size": size,
            "wanted": "run",
        }
        self._released = threading.Event()
        self._writing = threading.Lock()
        ask_launcher(run_dir, launch_id, "run")  # a file that is there is read anew on every host when it changes
        self.tell("run")
        self._thread = threading.Thread(target=self._beat_forever, daemon=True)
        self._thread.start()

    def tell(self, wanted: Wanted) -> None:
        """Say what the ranks shall do from now on; nobody can take back what was said."""
        with self._writing:
            self._record["wanted"] = max(self._record["wanted"], wanted, key=WISHES.index)
            self._write()

    def give(self, env: Mapping[str, str]) -> None:
        """Give every rank further variables."""
        with self._writing:
            self._record["env"] |= env
            self._write()

    def _write(self) -> None:
        with atomic_path(self._path) as part:
            part.touch(0o600)  # a variable may hold a password
            part.write_text(json_text(self._record), encoding="utf-8")

    def keep_wish(self, wanted: Wanted) -> None:
        """Keep that a signal asked the launcher to stop, as `nd stop` would have, where nobody asked for more."""
        launch_id = self._record["launch"]
        if WISHES.index(wanted) > WISHES.index(asked_of_launcher(self._run_dir, launch_id)):
            ask_launcher(self._run_dir, launch_id, wanted)

    def _beat_forever(self) -> None:
        asked: Wanted = "run"
        while not self._released.wait(BEAT_INTERVAL_S):
            with self._writing:
                os.utime(self._path)
            before, asked = asked, asked_of_launcher(self._run_dir, self._record["launch"])
            if asked in (before, "run"):
                continue
            self.stop.ask(asked)
            with contextlib.suppress(StorageError):  # a full disk: whoever holds the folder meets it too, and says so
                self.tell(asked)

    def release(self) -> None:
        """End the heartbeat and give the folder back; a second time does nothing."""
        if self._lock is not None:
            self._released.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
