"""`nd status RUN`: where a run stands, from its events and its launcher's record. Reads, changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.supervise.heartbeat import BEAT_INTERVAL_S, describe_launcher, launch_record_path
from nd_dist.errors import DataError
from nd_dist.events import read_events

QUIET_BEATS = 15
RECENT_STEPS = 50
Event = Mapping[str, Any]  # Any: whatever an event holds


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Args:
        command: The newest launch's command; empty where nothing was launched.
        state: running, done, failed, stopped, or gone (the launcher left without a word).
        progress: ``task done/total`` of the newest task.
        stage, step: Of the training; 0 where none began.
        samples_per_s: Over the last steps; 0 where unknown.
        hosts: Rank numbers by host.
        unfinished: Ranks that have not said that they are done.
        last_error: Of the newest launch; empty if none.
        age_s: Seconds since the newest event.
    """

    command: str = ""
    state: str = "empty"
    progress: str = ""
    stage: int = 0
    step: int = 0
    samples_per_s: float = 0.0
    hosts: Mapping[str, tuple[int, ...]] | None = None
    unfinished: tuple[int, ...] = ()
    last_error: str = ""
    age_s: float = 0.0


def summarize(events: Sequence[Sequence[Event]], is_running: bool, now: float) -> Status:
    """Return the status of a run.

    Args:
        events: Every rank's events, each list in the order of writing.
        is_running: Whether a launcher works in the run folder.
        now: Seconds, the clock of the events.
    """
    starts = [event for own in events for event in own if event["event"] == "rank_start"]
    if not starts:
        return Status(state="running" if is_running else "empty")
    newest = max(starts, key=lambda event: float(event["time"]))
    recent = [_since(own, newest["launch"]) for own in events]
    flat = [event for own in recent for event in own]
    done = {event["rank"] for event in flat if event["event"] == "rank_done"}
    hosts: dict[str, list[int]] = {}
    for event in flat:
        if event["event"] == "rank_start":
            hosts.setdefault(event["host"], []).append(event["rank"])
    failures = [event for event in flat if event["event"] in ("rank_failed", "rank_lost")]
    unfinished = tuple(rank for rank in range(newest["size"]) if rank not in done)
    steps = [event for event in (recent[0] if recent else []) if event["event"] == "train_step"]
    tasks = [event for event in (recent[0] if recent else []) if event["event"] == "progress"]
    return Status(
        command=newest["command"],
        state=_state(is_running, unfinished, failures),
        progress=f"{tasks[-1]['task']} {tasks[-1]['done']}/{tasks[-1]['total']}" if tasks else "",
        stage=steps[-1]["stage"] if steps else 0,
        step=steps[-1]["step"] + 1 if steps else 0,
        samples_per_s=_speed(steps),
        hosts={name: tuple(sorted(ranks)) for name, ranks in hosts.items()},
        unfinished=unfinished,
        last_error=_error(failures),
        age_s=now - max(float(event["time"]) for event in flat),
    )


def _since(events: Sequence[Event], launch: str) -> list[Event]:
    """Return a rank's events since it started in a launch."""
    starts = [n for n, event in enumerate(events) if event["event"] == "rank_start" and event["launch"] == launch]
    return list(events[starts[0] :]) if starts else []


def _state(is_running: bool, unfinished: Sequence[int], failures: Sequence[Event]) -> str:
    """Return one word for how the newest launch stands."""
    if is_running:
        return "running"
    if not unfinished:
        return "done"
    if any(event.get("kind") != "Requeue" for event in failures):
        return "failed"
    return "stopped" if failures else "gone"


def _error(failures: Sequence[Event]) -> str:
    """Return the first line of the first failure, with its rank and host."""
    real = [event for event in failures if event.get("kind") != "Requeue"]
    if not real:
        return ""
    first = min(real, key=lambda event: float(event["time"]))
    text = str(first.get("cause") or first.get("message")).splitlines()[0]
    return f"rank {first['rank']} on {first['host']}: {text}"


def _speed(steps: Sequence[Event]) -> float:
    """Return the samples per second of the last steps."""
    last = steps[-RECENT_STEPS:]
    seconds = sum(float(event["step_s"]) for event in last)
    samples = sum(float(event["samples_per_s"]) * float(event["step_s"]) for event in last)
    return samples / seconds if seconds > 0 else 0.0


def is_launcher_alive(run_dir: Path, now: float) -> bool:
    """Return whether a launcher keeps its record in the run folder fresh."""
    try:
        age = now - launch_record_path(run_dir).stat().st_mtime
    except OSError:
        return False
    return age < QUIET_BEATS * BEAT_INTERVAL_S


def print_status(run_dir: Path) -> None:
    """Print where a run stands.

    Raises:
        DataError: the folder holds no run.
    """
    if not (run_dir / "config.yaml").is_file():
        raise DataError("There is no run in this folder.", where=str(run_dir), todo="give the run_dir of a recipe")
    now = time.time()
    events = [list(read_events(path)) for path in sorted((run_dir / "events").glob("rank-*.jsonl"))]
    status = summarize(events, is_launcher_alive(run_dir, now), now)
    console = Console(soft_wrap=True)
    for label, text in _lines(status, run_dir):
        console.print(f"  {label:<12} {text}", highlight=False, markup=False)


def _lines(status: Status, run_dir: Path) -> list[tuple[str, str]]:
    """Return the labelled lines of a status; what is unknown is left out."""
    lines = [("state", f"{status.state} {status.command}".strip())]
    if status.progress:
        lines.append(("progress", status.progress))
    if status.stage:
        lines.append(("training", f"stage {status.stage}, step {status.step}, {status.samples_per_s:.1f} samples/s"))
    for host, ranks in (status.hosts or {}).items():
        left = [rank for rank in ranks if rank in status.unfinished]
        lines.append(("host", f"{host}: ranks {', '.join(map(str, ranks))}" + ("" if left else " (done)")))
    if status.last_error:
        lines.append(("last error", status.last_error))
    if status.command:
        lines.append(("last event", f"{status.age_s:.0f} s ago"))
        lines.append(("logs", str(run_dir / "logs" / status.command)))
    if status.state == "running":
        lines.append(("launcher", describe_launcher(run_dir)))
    return lines
