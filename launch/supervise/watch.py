"""Turns rank 0's events into a progress bar on a terminal, and into plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nd_dist.evaluation.reconstruction.costs import duration
from nd_dist.events import parse_event

PLAIN_INTERVAL_S = 15.0


class FileTail:
    """Reads what is appended to a file, which need not be there yet.

    Args:
        path: The file.
        offset: Bytes to leave out.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    def read(self, must_open: bool = True) -> bytes:
        """Return what was appended since the last call.

        Args:
            must_open: Open the file even if it looks unchanged: a network file system then asks its server.
        """
        try:
            if not must_open and self._path.stat().st_size == self._offset:
                return b""
            with open(self._path, "rb") as stream:
                stream.seek(self._offset)
                fresh = stream.read()
        except FileNotFoundError:
            return b""
        self._offset += len(fresh)
        return fresh


class EventTail:
    """Reads the events that are appended to an event file from now on."""

    def __init__(self, path: Path) -> None:
        self._tail = FileTail(path, path.stat().st_size if path.exists() else 0)
        self._rest = b""

    def read(self, must_open: bool = True) -> list[dict[str, Any]]:
        """Return the events that were completed since the last call (see ``FileTail.read``)."""
        *lines, self._rest = (self._rest + self._tail.read(must_open)).split(b"\n")
        return [event for line in lines for event in parse_event(line)]


class Watcher:
    """Shows one launch: a bar per task on a terminal, a line every few seconds otherwise.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._last_shown = ("", 0)
        self._begun: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )
            self._progress.start()

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}

    def show(self, event: dict[str, Any]) -> None:
        """Show one event of rank 0."""
        if event["event"] == "notice":
            self._console.print(f"  note: {event['message']}")
        elif event["event"] == "model":
            millions = sum(event["parameters"].values()) / 1e6
            self._console.print(f"  stage {event['stage']}: {millions:.2f} million parameters")
        elif event["event"] == "progress":
            detail = f"loss {float(event['loss']):.4g}" if "loss" in event else ""
            left_s = float(event["left_s"]) if event.get("left_s") else None
            self._advance(str(event["task"]), int(event["done"]), int(event["total"]), detail, left_s)

    def _advance(self, task: str, done: int, total: int, detail: str, left_s: float | None) -> None:
        """Move the bar of a task, or write its line; ``left_s`` is the ranks' own estimate, where they have one."""
        if self._progress is not None:
            if task not in self._tasks:
                self._tasks[task] = self._progress.add_task(task, total=total, detail=detail)
            self._progress.update(self._tasks[task], completed=done, total=total, detail=detail)
            return
        self._begun.setdefault(task, (done, time.monotonic()))
        if (task, done) != self._last_shown and (
            done == total or time.monotonic() - self._last_line > PLAIN_INTERVAL_S
        ):
            self._last_line, self._last_shown = time.monotonic(), (task, done)
            left_s = self._seconds_left(task, done, total) if left_s is None else left_s
            detail = f"{detail} about {duration(left_s)} left".strip() if left_s else detail
            self._console.print(f"  {task}: {done}/{total} {detail}".rstrip())

    def _seconds_left(self, task: str, done: int, total: int) -> float:
        """Return what the rest takes at the pace since this launch first heard of the task; 0 where none is known."""
        first, since = self._begun.setdefault(task, (done, time.monotonic()))
        return (time.monotonic() - since) / (done - first) * (total - done) if done > first else 0.0
