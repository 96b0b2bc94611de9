"""`nd logs RUN`: what a rank wrote, and what it goes on to write."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.supervise.heartbeat import running_launch
from launch.supervise.watch import FileTail
from nd_dist.errors import DataError
from nd_dist.events import log_path

POLL_S = 0.3
PAUSE_S = 5.0
"""Between two commands of one script (`nd demo`) nothing runs for a moment; longer, and the end is reached."""


def logs_command(run_dir: Path, rank: int, command: str, is_followed: bool) -> None:
    """Write a rank's log to standard output.

    Args:
        run_dir: Folder of the run.
        rank: Whose log.
        command: Of which command; empty: the last one, and those that come after it.
        is_followed: Whether to go on until no launch works in the folder any more.

    Raises:
        DataError: there is no such log.
    """
    path = _newest(run_dir, rank, command)
    if path is None and not (is_followed and running_launch(run_dir, time.time())):
        known = sorted(str(log.relative_to(run_dir)) for log in run_dir.glob("logs/*/*.log"))
        raise DataError(
            "There is no such log.",
            where=str(run_dir / "logs"),
            expected=f"that of rank {rank}" + (f" in `nd {command}`" if command else ""),
            found=", ".join(known) or "none",
        )
    if is_followed:
        _follow(run_dir, rank, command, path)
    elif path is not None:
        _write(FileTail(path, 0).read())


def _follow(run_dir: Path, rank: int, command: str, path: Path | None) -> None:
    """Write a log and what is appended to it, then the log of the next command, until nothing runs any more."""
    seen = {log: log.stat().st_size for log in run_dir.glob("logs/*/*.log") if log != path}
    tail = FileTail(path, 0) if path is not None else None
    last_alive = time.monotonic()
    while True:
        if running_launch(run_dir, time.time()):
            last_alive = time.monotonic()
        is_over = time.monotonic() - last_alive > PAUSE_S
        if tail is not None:
            _write(tail.read())
        newest = _newest(run_dir, rank, command)
        if newest is not None and newest != path:
            path, tail = newest, FileTail(newest, seen.get(newest, 0))
            _write(f"==> {path} <==\n".encode())
        elif is_over:
            return
        time.sleep(POLL_S)


def _newest(run_dir: Path, rank: int, command: str) -> Path | None:
    """Return the log of a rank that was written to last."""
    logs = run_dir.glob(str(log_path(Path(), command or "*", rank)))
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _write(content: bytes) -> None:
    """Write to standard output at once."""
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
