"""Runs a plan: owns the process tree, shows progress, and believes completion records, never an exit code alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.liveness import RunFolder
from launch.plan import LaunchPlan
from launch.rank import log_path
from launch.watch import EventTail, Watcher
from nd_dist.errors import NdDistError, RankFailure, Requeue
from nd_dist.events import events_path, read_events

POLL_S = 0.2
GRACE_S = 30.0
LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class Launch:
    """One start of the ranks of one command.

    Args:
        command: ``pack``, ``train``, ``evaluate``, ``sweep``.
        run_dir: Folder of the run.
        launch_id: Id that the ranks were given.
        plan: What to start.
    """

    command: str
    run_dir: Path
    launch_id: str
    plan: LaunchPlan


def run_plan(
    launch: Launch, watcher: Watcher, environ: Mapping[str, str], folder: RunFolder | None = None
) -> list[int]:
    """Start the ranks, follow them to the end, leave no process behind; return the ranks that died on the way.

    Only ranks of a leased plan may die without failing it.

    Args:
        launch: What to start.
        watcher: Shows the events of rank 0.
        environ: The environment to start from.
        folder: The run folder's lock, if the caller holds it already.

    Raises:
        RankFailure: a rank failed, was killed, or never said that it was done.
        Requeue: the launcher was asked to stop (SIGTERM, SIGINT) and the ranks saved their state.
        NdDistError: the error that a rank reported (its own class of exit code).
    """
    held = folder or RunFolder(launch.run_dir, launch.launch_id)
    tails = [EventTail(events_path(launch.run_dir, rank)) for rank in range(launch.plan.ranks)]
    stopped_by = _StopSignal()
    launcher_log = launch.run_dir / "logs" / launch.command / "launcher.log"
    launcher_log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(launcher_log, "ab") as log, stopped_by, watcher:
            process = subprocess.Popen(
                launch.plan.argv,
                env={**environ, **launch.plan.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                outcome = _follow(process, launch, tails, watcher, stopped_by)
            finally:
                _end_tree(process)
    finally:
        if folder is None:
            held.release()
    return outcome.judge(launch, launcher_log, process.returncode, stopped_by.name)


class _StopSignal:
    """Remembers SIGINT, SIGTERM and SIGHUP while the ranks run, so that they can save first."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}  # Any: whatever signal.signal returned

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._remember) for number in self._NUMBERS}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Outcome:
    """What the ranks said about their end."""

    def __init__(self, launch_id: str) -> None:
        self._launch_id = launch_id
        self.done: set[int] = set()
        self.failed: list[dict[str, Any]] = []

    def note(self, event: dict[str, Any]) -> None:
        """Take one event of a rank into account."""
        if event.get("launch") != self._launch_id:
            return
        if event["event"] == "rank_done":
            self.done.add(event["rank"])
        elif event["event"] == "rank_failed":
            self.failed.append(event)

    def judge(self, launch: Launch, launcher_log: Path, returncode: int | None, stopped_by: str) -> list[int]:
        """Return the ranks that are missing if the work is done, raise the error that explains the end otherwise."""
        missing = sorted(set(range(launch.plan.ranks)) - self.done)
        if not missing or (self.done and launch.plan.is_leased):
            return missing
        if stopped_by:
            raise Requeue(
                f"Stopped by {stopped_by}; what was finished is on disk.", todo="run the same command again to go on"
            )
        if self.failed:
            raise _reported(min(self.failed, key=_blame), launch)
        log = log_path(launch.run_dir, launch.command, missing[0])
        tail = tail_of(log) or tail_of(launcher_log)
        last = [words for rank in missing if (words := last_unit(launch.run_dir, rank, launch.launch_id))]
        raise RankFailure(
            f"Ranks {missing} of `{launch.command}` ended without finishing (killed, or never started).",
            where="; ".join([*last, str(log if log.exists() else launcher_log)]),
            expected=f"{launch.plan.ranks} ranks that report rank_done",
            found=f"exit code {returncode} of the launcher\n{tail}",
            todo="run the same command again; it goes on from what is valid",
        )


def _blame(event: dict[str, Any]) -> tuple[bool, float]:
    """Order failures: an error that nd_dist names before the crashes that follow it, then the earliest."""
    return event["exit_code"] not in (2, 3), event["time"]


def _reported(event: dict[str, Any], launch: Launch) -> NdDistError:
    """Return the error of a rank's ``rank_failed`` event, with its exit code."""
    log = log_path(launch.run_dir, launch.command, event["rank"])
    kinds = {kind.__name__: kind for kind in NdDistError.__subclasses__()}
    kind = kinds.get(event["kind"], RankFailure)
    message = f"Rank {event['rank']} on {event['host']}: {event['message']}"
    if kind is RankFailure:
        return RankFailure(message, where=str(log), found=tail_of(log), todo="run the same command again")
    return kind(message, where=f"log {log}")


def last_unit(run_dir: Path, rank: int, launch_id: str) -> str:
    """Return where a rank of a leased command ran and what it did last; empty where it did not come so far."""
    place, unit = "", ""
    for event in read_events(events_path(run_dir, rank)):
        if event["event"] == "rank_start":
            is_ours = event.get("launch") == launch_id
            place, unit = (f"rank {rank} on {event['host']}", "") if is_ours else ("", "")
        elif event["event"] == "unit_began":
            unit = f" in unit {event['unit']}"
    return place + unit if place else ""


def tail_of(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a text file, indented; empty if there is none."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    | {line}" for line in text[-lines:])


def _follow(
    process: subprocess.Popen[bytes], launch: Launch, tails: list[EventTail], watcher: Watcher, stop: _StopSignal
) -> _Outcome:
    """Feed events to the watcher until the launcher ends, all ranks have ended, or a stop ran out of grace."""
    outcome = _Outcome(launch.launch_id)
    deadline: float | None = None
    while True:
        ended = process.poll() is not None
        for rank, tail in enumerate(tails):
            for event in tail.read():
                outcome.note(event)
                if rank == 0:
                    watcher.show(event)
        if ended:
            return outcome
        is_lost = bool(outcome.failed) and not launch.plan.is_leased
        if deadline is None and (stop.name or is_lost):
            _signal_tree(process, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return outcome
        time.sleep(POLL_S)


def _signal_tree(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the whole session of the launcher."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the launcher's session and reap it."""
    _signal_tree(process, signal.SIGKILL)
    process.wait()
