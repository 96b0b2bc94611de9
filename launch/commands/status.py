"""`nd status RUN` and `nd stop RUN`: where a run stands, from events and its launcher's record; its end on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from launch.console import aligned, make_console
from launch.plans.choose import LEASED
from launch.supervise.heartbeat import Wanted, ask_launcher, asked_of_launcher, describe_launcher, running_launch
from launch.supervise.outcome import is_echo
from nd_dist.errors import DataError, RankFailure
from nd_dist.events import read_events

RECENT_STEPS = 50
RUNNING = ("starting", "running")
WATCH_INTERVAL_S, STOP_INTERVAL_S = 2.0, 0.5
Event = Mapping[str, Any]  # Any: whatever an event holds


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Args:
        command: The newest launch's command; empty where nothing was launched.
        state: starting (no rank yet), running, done, failed, stopped, or gone (the launcher left without a word).
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


def summarize(
    events: Sequence[Sequence[Event]], running: str, now: float, asked_of: Callable[[str], Wanted] = lambda _: "run"
) -> Status:
    """Return the status of a run.

    Args:
        events: Every rank's events, each list in the order of writing.
        running: The launch that works in the run folder; empty if none does.
        now: Seconds, the clock of the events.
        asked_of: What somebody asked of a launch.
    """
    starts = [event for own in events for event in own if event["event"] == "rank_start"]
    if running and running not in {event["launch"] for event in starts}:
        return Status(_command_of(running), "starting")
    if not starts:
        return Status(state="empty")
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
    is_done = not unfinished or (newest["command"] in LEASED and bool(done))
    wanted = asked_of(newest["launch"])
    steps = [event for event in (recent[0] if recent else []) if event["event"] == "train_step"]
    tasks = [event for event in (recent[0] if recent else []) if event["event"] == "progress"]
    return Status(
        command=newest["command"],
        state=_state(bool(running), is_done, wanted, failures),
        progress=f"{tasks[-1]['task']} {tasks[-1]['done']}/{tasks[-1]['total']}" if tasks else "",
        stage=steps[-1]["stage"] if steps else 0,
        step=steps[-1]["step"] + 1 if steps else 0,
        samples_per_s=_speed(steps),
        hosts={name: tuple(sorted(ranks)) for name, ranks in hosts.items()},
        unfinished=unfinished,
        last_error="" if wanted == "end" else _error(failures),  # who ends ranks makes the others fail
        age_s=now - max(float(event["time"]) for event in flat),
    )


def _since(events: Sequence[Event], launch: str) -> list[Event]:
    """Return a rank's events since it started in a launch."""
    starts = [n for n, event in enumerate(events) if event["event"] == "rank_start" and event["launch"] == launch]
    return list(events[starts[0] :]) if starts else []


def _state(is_running: bool, is_done: bool, wanted: Wanted, failures: Sequence[Event]) -> str:
    """Return one word for how the newest launch stands."""
    if is_running:
        return "running"
    if is_done:
        return "done"
    has_failed = any(event.get("kind") != "Requeue" for event in failures)
    if has_failed and wanted != "end":
        return "failed"
    return "stopped" if failures or wanted != "run" else "gone"


def _error(failures: Sequence[Event]) -> str:
    """Return the first line of the first failure that does not follow from another, with its rank and host."""
    real = [event for event in failures if event.get("kind") != "Requeue"]
    if not real:
        return ""
    causes = [event for event in real if not is_echo(event)]
    first = min(causes or real, key=lambda event: float(event["time"]))
    text = str(first.get("cause") or first.get("message")).splitlines()[0]
    return f"rank {first['rank']} on {first['host']}: {text}"


def _speed(steps: Sequence[Event]) -> float:
    """Return the samples per second of the last steps."""
    last = steps[-RECENT_STEPS:]
    seconds = sum(float(event["step_s"]) for event in last)
    samples = sum(float(event["samples_per_s"]) * float(event["step_s"]) for event in last)
    return samples / seconds if seconds > 0 else 0.0


def find_runs(folder: Path, levels: int = 3) -> Iterator[Path]:
    """Yield the run folders at or below a folder, by name; below a run only those that lie directly in it."""
    is_run = _is_run(folder)
    if is_run:
        yield folder
    if levels and folder.is_dir():
        for child in sorted(path for path in folder.iterdir() if path.is_dir()):
            if not is_run or _is_run(child):
                yield from find_runs(child, levels - 1)


def _is_run(folder: Path) -> bool:
    """Return whether a command ran in a folder."""
    return (folder / "config.yaml").is_file()


def status_of(run_dir: Path) -> Status:
    """Return where the run of a folder stands."""
    now = time.time()
    events = [list(read_events(path)) for path in sorted((run_dir / "events").glob("rank-*.jsonl"))]
    return summarize(events, running_launch(run_dir, now).get("launch", ""), now, partial(asked_of_launcher, run_dir))


def status_command(run_dir: Path, is_watched: bool) -> None:
    """Print where a run stands, or a line for each of several; on request again and again until nothing runs.

    Raises:
        DataError: the folder holds no run.
    """
    console = make_console()
    if not is_watched:
        console.print(describe_runs(run_dir))
        return
    with Live(console=console, auto_refresh=False) as live:
        is_running = True
        while is_running:
            is_running = any(running_launch(run, time.time()) for run in [run_dir, *find_runs(run_dir)])
            live.update(Text(describe_runs(run_dir)), refresh=True)
            time.sleep(WATCH_INTERVAL_S if is_running else 0)


def describe_runs(run_dir: Path) -> str:
    """Return where a run stands, or a line for each of several.

    Raises:
        DataError: the folder holds no run.
    """
    if _is_run(run_dir):
        return aligned(list(_lines(status_of(run_dir), run_dir)))
    launch = running_launch(run_dir, time.time())  # that of a grid, whose trainings are runs of their own
    rows = [(str(run_dir), f"running {_command_of(launch['launch'])}", "", "")] if launch else []
    rows += [(str(run), *_columns(status_of(run))) for run in find_runs(run_dir)]
    if not rows:
        raise DataError("There is no run in this folder.", where=str(run_dir), todo="give the run_dir of a recipe")
    return aligned(rows)


def _command_of(launch_id: str) -> str:
    """Return the command of a launch."""
    return launch_id.partition("-")[0]


def _columns(status: Status) -> tuple[str, str, str]:
    """Return the columns of a status in a list: state, progress, last error or age."""
    age = f"{status.age_s:.0f} s ago" if status.hosts else ""
    return f"{status.state} {status.command}".strip(), status.progress, status.last_error or age


def _lines(status: Status, run_dir: Path) -> Iterator[tuple[str, str]]:
    """Yield the labelled lines of a status; what is unknown is left out."""
    yield "state", f"{status.state} {status.command}".strip()
    if status.progress:
        yield "progress", status.progress
    if status.stage:
        yield "training", f"stage {status.stage}, step {status.step}, {status.samples_per_s:.1f} samples/s"
    for host, ranks in (status.hosts or {}).items():
        left = [rank for rank in ranks if rank in status.unfinished]
        yield "host", f"{host}: ranks {', '.join(map(str, ranks))}" + ("" if left else " (done)")
    if status.last_error:
        yield "last error", status.last_error
    if status.hosts:
        yield "last event", f"{status.age_s:.0f} s ago"
        yield "logs", str(run_dir / "logs" / status.command)
    if status.state in RUNNING:
        yield "launcher", describe_launcher(run_dir)


def stop_command(run_dir: Path, is_now: bool) -> None:
    """Ask the launch of a run folder to stop, on whatever host it runs; a folder in which nothing runs is left alone.

    Args:
        run_dir: Folder of the run, or of a grid of trainings.
        is_now: Whether it ends at once, without saving.

    Raises:
        RankFailure: the launch failed while it stopped.
    """
    console = make_console()
    launch = running_launch(run_dir, time.time())
    if launch:
        ask_launcher(run_dir, launch["launch"], "end" if is_now else "stop")
        wish = "end at once" if is_now else "save and stop"
        console.print(f"  asked {describe_launcher(run_dir)} to {wish}; waiting for it")
        while running_launch(run_dir, time.time()).get("launch") == launch["launch"]:
            time.sleep(STOP_INTERVAL_S)
    else:
        console.print(f"  nothing is running in {run_dir}")
    if next(find_runs(run_dir), None) or not launch:
        console.print(describe_runs(run_dir))
    status = status_of(run_dir)
    if launch and status.state == "failed":
        raise RankFailure("The launch failed while it stopped.", where=str(run_dir), found=status.last_error)
