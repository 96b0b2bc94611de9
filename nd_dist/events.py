"""One append-only JSON-lines file per rank: facts, not sentences. The launcher turns them into progress bars.

A line has ``time`` (UTC seconds), ``event``, ``command``, ``rank`` and the event's own fields. Long work reports
``event="progress", task, done, total``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def events_path(run_dir: Path, rank: int) -> Path:
    """Return the event file of a rank."""
    return run_dir / "events" / f"rank-{rank:04d}.jsonl"


def log_path(run_dir: Path, command: str, rank: int) -> Path:
    """Return the file that takes a rank's standard output and error."""
    return run_dir / "logs" / command / f"rank-{rank:04d}.log"


class EventLog:
    """Appends one rank's events to its file, which stays open; a line is written at once and whole.

    Args:
        run_dir: Folder of the run.
        rank: This process's rank.
        command: The command whose rank this is (``train``, ``evaluate``, ...).
    """

    def __init__(self, run_dir: Path, rank: int, command: str) -> None:
        path = events_path(run_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115 - closed with this object
        self.command = command
        self._fixed = {"command": command, "rank": rank}

    def write(self, event: str, **fields: Any) -> None:  # Any: whatever JSON holds
        """Append one event; non-finite numbers are written as text so that every line stays JSON."""
        line = {"time": round(time.time(), 3), "event": event, **self._fixed, **fields}
        text = json.dumps({key: _plain(value) for key, value in line.items()}) + "\n"
        self._stream.write(text.encode("utf-8"))

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        """Append a progress event of a task: ``done`` of ``total`` units."""
        self.write("progress", task=task, done=done, total=total, **fields)


def _plain(value: Any) -> Any:
    """Return a value that strict JSON can hold (NaN and infinities become text, paths and tuples plain)."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of one file; what a full disk tore, or is still being written, is left out."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield from parse_event(line)


def parse_event(line: bytes) -> Iterator[dict[str, Any]]:
    """Yield the event of a line; nothing if a full disk tore it."""
    with suppress(ValueError):
        yield json.loads(line)
