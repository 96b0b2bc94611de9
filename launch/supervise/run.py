"""Runs a plan: owns the process tree, shows progress, and believes completion records, never an exit code alone."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from launch.host_agents.agents import HostAgents
from launch.plans.plan import LaunchPlan
from launch.supervise.door import Door
from launch.supervise.lock import RunFolder
from launch.supervise.outcome import LAUNCHER_LOG, Outcome
from launch.supervise.stop import StopSignal
from launch.supervise.tree import ProcessTree
from launch.supervise.watch import EventTail, Watcher
from nd_dist.events import events_path
from nd_dist.files import write_text

POLL_S, POLL_S_PER_RANK = 0.2, 0.002  # between two looks at the ranks' event files
OPENED_PER_LOOK = 16  # of the files that look unchanged, in turn; the size alone tells of the others
STOP_GRACE_S = 45.0
FAILURE_GRACE_S = 8.0  # after a failure nobody can finish; the others get a moment to say what they met
LATE_S = 30.0  # leased work is done when one rank says so; the others look for work every moment and follow at once
END_GRACE_S = 4.0  # from "end at once" until the starting process itself is killed


@dataclass(frozen=True)
class Launch:
    """One start of the ranks of one command.

    Args:
        command: ``pack``, ``train``, ``evaluate``, ``sweep``.
        run_dir: Folder of the run.
        launch_id: Id that the ranks were given.
        plan: What to start.
        stop_grace_s: Seconds that ranks get to save after a stop was asked for.
        silence_s: Seconds without an event of any rank after which the ranks count as hung.
        start_s: Seconds within which every rank must have started.
    """

    command: str
    run_dir: Path
    launch_id: str
    plan: LaunchPlan
    stop_grace_s: float = STOP_GRACE_S
    silence_s: float = math.inf
    start_s: float = math.inf

    @property
    def log_dir(self) -> Path:
        """Takes what the starting process and the ranks print."""
        return self.run_dir / "logs" / self.command


def run_plan(
    launch: Launch,
    watcher: Watcher,
    environ: Mapping[str, str],
    agents: HostAgents | None = None,
    door: Door | None = None,
) -> list[int]:
    """Start the ranks, follow them to the end, leave no process behind; return the ranks that were lost on the way.

    Only ranks of a leased plan may be lost without failing it.

    Args:
        launch: What to start.
        watcher: Shows the events of rank 0.
        environ: The environment to start from.
        agents: Of the other hosts, where there are any.
        door: Lets in the ranks that somebody else's launcher has started; the plan starts rank 0 alone.

    Raises:
        RankFailure: a rank or a host failed, was killed, or never said that it was done.
        Requeue: the launcher was asked to stop (SIGTERM, SIGINT) and the ranks saved their state.
        NdDistError: the error that a rank reported (its own class of exit code).
    """
    folder = door.folder if door else None
    folder = folder or RunFolder(launch.run_dir, launch.launch_id, launch.plan.env, launch.plan.ranks)
    try:
        launch.log_dir.mkdir(parents=True, exist_ok=True)
        for path, text in launch.plan.files.items():
            write_text(path, text)
        with open(launch.log_dir / LAUNCHER_LOG, "ab") as log, folder.stop, watcher, ProcessTree() as tree:
            process = subprocess.Popen(
                launch.plan.argv,
                env={**environ, **launch.plan.env, **launch.plan.own_env},
                cwd="/",  # pdsh would put the caller's folder into a shell; the ranks change to it by themselves
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            following = _Following(launch, process, folder, agents, door)
            try:
                following.follow(watcher, folder.stop)
            finally:
                folder.tell("end")
                following.end_process()
                tree.kill()
    finally:
        folder.release()
    return following.outcome.judge(process.returncode, following.stopped_by)


class _Following:
    """Follows one launch from its start to the moment when nothing of it runs on this machine."""

    def __init__(
        self,
        launch: Launch,
        process: subprocess.Popen[bytes],
        folder: RunFolder,
        agents: HostAgents | None,
        door: Door | None,
    ) -> None:
        self._launch, self._process, self._folder, self._agents, self._door = launch, process, folder, agents, door
        self._tails = [EventTail(events_path(launch.run_dir, rank)) for rank in range(launch.plan.ranks)]
        self._begun_at = self._heard_at = self._done_at = time.monotonic()
        self._looks = 0
        self.outcome = Outcome(launch.launch_id, launch.plan, launch.log_dir)
        self.stopped_by = ""

    def follow(self, watcher: Watcher, stop: StopSignal) -> None:
        """Feed events to the watcher until the starting process ends, or the ranks had their time to."""
        stop_at: float | None = None
        end_at: float | None = None
        wanted = stop.wanted
        while True:
            has_ended = self._process.poll() is not None
            self._read(watcher, has_ended)
            if wanted != stop.wanted:
                wanted = stop.wanted
                self._folder.keep_wish(wanted)
            if stop.name and not self.outcome.has_failed:  # a signal after a failure is no reason to hide it
                self.stopped_by = stop.name
            if has_ended and not self._others_work():
                return
            now = time.monotonic()
            if now - self._begun_at > self._launch.start_s:
                self.outcome.start_s = self._launch.start_s
            if stop_at is None and (stop.name or self.outcome.has_failed):
                self._folder.tell("stop")
                stop_at = now + (FAILURE_GRACE_S if self.outcome.has_failed else self._launch.stop_grace_s)
            elif stop_at is not None and self.outcome.has_failed:
                stop_at = min(stop_at, now + FAILURE_GRACE_S)
            elif stop_at is None and has_ended and not self._launch.plan.is_leased:
                stop_at = now + self._launch.stop_grace_s
            is_over, is_late = not self.outcome.open_ranks, stop_at is not None and now > stop_at
            if end_at is None and (is_over or is_late or stop.count > 1 or self._hangs(now)):
                if not is_over:
                    self._folder.tell("end")
                end_at = now + (FAILURE_GRACE_S if is_over else END_GRACE_S)
            if end_at is not None and now > end_at:
                return
            time.sleep(max(POLL_S, POLL_S_PER_RANK * len(self._tails)))

    def _others_work(self) -> bool:
        """Return whether ranks of another launcher still work when rank 0's process has ended."""
        if self._door is not None and 0 in self.outcome.open_ranks:
            cause = f"its process ended with exit code {self._process.returncode} and said nothing"
            lost = {"event": "rank_lost", "rank": 0, "launch": self._launch.launch_id, "host": gethostname()}
            self.outcome.note({**lost, "cause": cause})
        return self._door is not None and bool(self.outcome.open_ranks)

    def _hangs(self, now: float) -> bool:
        """Return whether nobody says anything any more, or a rank does not leave although all work is done."""
        is_done = self._launch.plan.is_leased and bool(self.outcome.done)
        return now - self._heard_at > self._launch.silence_s or (is_done and now - self._done_at > LATE_S)

    def _read(self, watcher: Watcher, has_ended: bool) -> None:
        """Let in whoever knocks; take in what the ranks wrote (from every file when all have left) and lost hosts."""
        if self._door is not None:
            self._door.answer(launch=self._launch.launch_id)
        for rank, tail in enumerate(self._tails):
            turn = (rank - self._looks * OPENED_PER_LOOK) % len(self._tails)
            for event in tail.read(must_open=turn < OPENED_PER_LOOK or has_ended):
                self._heard_at = time.monotonic()
                self._done_at = self._heard_at if event["event"] == "rank_done" else self._done_at
                self.outcome.note(event)
                if rank == 0:
                    watcher.show(event)
        self._looks += 1
        for host in self._agents.lost() if self._agents is not None else ():
            self.outcome.lose(host)

    def end_process(self) -> None:
        """Kill whatever is left of the starting process's session and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
