"""How a launch ended, from what its ranks said, which hosts were lost, and how the starting process left. Pure.

One message comes out: the rank and host to blame, the cause, where the log is, and what to do next.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.plans.hosts import host_of_rank
from launch.plans.plan import LaunchPlan
from nd_dist.errors import ConfigError, DataError, NdDistError, RankFailure, Requeue, StorageError
from nd_dist.events import log_path

_BY_CODE: dict[int, type[NdDistError]] = {2: ConfigError, 3: DataError, 5: Requeue}
NAMED_CODES = (2, 3)  # errors that nd_dist itself names: configuration, data, world, checkpoint
STORAGE = StorageError.__name__
# what a rank meets when *another* one is gone or failed: gloo's, NCCL's, the rendezvous' and our own words
ECHO = re.compile(
    r"closed by peer|[Cc]onnection (reset|refused|closed|was likely closed)|[Tt]imed? ?out|Broken pipe|NCCL|"
    r"DistBackendError|DistNetworkError|remote process exited|^Another rank could not"
)
LOG_TAIL_LINES = 20
LAUNCHER_LOG = "launcher.log"
AGAIN = "run the same command again; it resumes from the last valid state"


@dataclass
class Outcome:
    """What the ranks and hosts of one launch said so far.

    Args:
        launch_id: Events of other launches are left out.
        plan: What was started.
        log_dir: Takes ``launcher.log``, which the starting process writes, and the ranks' logs.
    """

    launch_id: str
    plan: LaunchPlan
    log_dir: Path
    done: set[int] = field(default_factory=set)
    ends: list[dict[str, Any]] = field(default_factory=list)  # Any: events
    lost_hosts: list[str] = field(default_factory=list)
    start_s: float = 0.0  # seconds that every rank had to start; 0: not over yet
    _started: set[int] = field(default_factory=set)
    _last: dict[int, tuple[str, float]] = field(default_factory=dict)
    _units: dict[int, str] = field(default_factory=dict)  # what a rank of a leased plan took last

    def note(self, event: dict[str, Any]) -> None:
        """Take one event into account, in the order in which they arrive here (hosts' clocks differ)."""
        if event["event"] == "rank_start" and event["launch"] != self.launch_id:
            return
        self._last[event["rank"]] = (event["event"], time.monotonic())
        if event["event"] == "unit_began":
            self._units[event["rank"]] = event["unit"]
        if event.get("launch") != self.launch_id:
            return
        if event["event"] == "rank_start":
            self._started.add(event["rank"])
        elif event["event"] == "rank_done":
            self.done.add(event["rank"])
        elif event["event"] in ("rank_failed", "rank_lost") and event["rank"] not in self.done:
            self.ends.append(event)

    def lose(self, host: str) -> None:
        """Take into account that a host does not respond any more."""
        if host not in self.lost_hosts:
            self.lost_hosts.append(host)

    @property
    def open_ranks(self) -> list[int]:
        """Ranks that have not said how they ended and whose host still answers."""
        ended = self.done | {event["rank"] for event in self.ends}
        return [rank for rank in range(self.plan.ranks) if rank not in ended and not self._is_cut_off(rank)]

    @property
    def has_failed(self) -> bool:
        """Whether the work cannot be finished any more. Ranks of a leased plan may be lost once work has begun.

        Before that they meet, and MPI lets nobody meet without all.
        """
        if self.plan.is_leased and (self._units or self.done):
            return any(event["exit_code"] in NAMED_CODES for event in self.ends if event["event"] == "rank_failed")
        return bool(self.ends or self.late) or any(self._is_cut_off(rank) for rank in range(self.plan.ranks))

    @property
    def late(self) -> list[int]:
        """Ranks that had their time to start and did not."""
        ended = {event["rank"] for event in self.ends}
        return [rank for rank in range(self.plan.ranks) if self.start_s and rank not in self._started | ended]

    def _host(self, rank: int) -> str:
        return host_of_rank(self.plan.hosts, rank) if self.plan.hosts else "this machine"

    def _place(self, rank: int, host: str) -> str:
        """Return a rank's host and, where the work is leased, the unit that it took last."""
        return host + (f" in unit {self._units[rank]}" if rank in self._units else "")

    def _is_cut_off(self, rank: int) -> bool:
        return rank not in self.done and self._host(rank) in self.lost_hosts

    def judge(self, returncode: int | None, stopped_by: str) -> list[int]:
        """Return the ranks that are missing if the work is done, raise the error that explains the end otherwise.

        Args:
            returncode: Of the starting process; shown, never believed.
            stopped_by: Signal that asked the launcher to stop; empty if none did.

        Raises:
            RankFailure: a rank failed, was killed, or never said that it was done.
            Requeue: the launcher was asked to stop.
            NdDistError: the error that a rank reported, of its own class.
        """
        missing = sorted(set(range(self.plan.ranks)) - self.done)
        if not missing or (self.done and self.plan.is_leased):
            return missing
        if stopped_by:
            raise Requeue(
                f"Stopped by {stopped_by}; what was finished is on disk.", todo="run the same command again to resume"
            )
        raise self._blame(missing, returncode)

    def _blame(self, missing: list[int], returncode: int | None) -> NdDistError:
        """Return the error that explains the end: first causes before the failures that follow from them."""
        failed = [event for event in self.ends if event["event"] == "rank_failed"]
        full = [event for event in failed if event["kind"] == STORAGE and not is_echo(event)]
        if named := [event for event in failed if event["exit_code"] in NAMED_CODES or event in full]:
            return self._reported(named[0])
        if cut_off := [rank for rank in missing if self._is_cut_off(rank)]:
            return self._host_lost(cut_off)
        stopped = [event for event in failed if event["exit_code"] == Requeue.exit_code]
        echoes = [event for event in failed if event not in stopped and is_echo(event)]
        if causes := [event for event in self.ends if event not in stopped and event not in echoes]:
            return self._reported(causes[0])
        silent = [rank for rank in missing if rank not in {event["rank"] for event in self.ends}]
        if unstarted := [rank for rank in silent if rank not in self._started]:
            return self._never_started(unstarted, returncode)
        if silent:
            return self._silent(silent, echoes, returncode)
        return self._reported((echoes or stopped)[0])

    def _reported(self, event: dict[str, Any]) -> NdDistError:
        """Return the error of a rank's ``rank_failed`` or ``rank_lost`` event, with its exit code."""
        rank, host, message = event["rank"], event["host"], event.get("cause") or event["message"]
        named: list[type[NdDistError]] = [*NdDistError.__subclasses__(), StorageError]
        kinds = {kind.__name__: kind for kind in named}
        kind = kinds.get(event.get("kind", "")) or _BY_CODE.get(event.get("exit_code", 0), RankFailure)
        if kind is RankFailure:
            return self._failure(f"Rank {rank} on {self._place(rank, host)}: {message}", self._log(rank))
        return kind(f"Rank {rank} on {host}: {message}", where=f"log {self._log(rank)}")

    def _host_lost(self, ranks: list[int]) -> RankFailure:
        """Return the error of a host that does not answer."""
        host = self._host(ranks[0])
        own = ", ".join(str(rank) for rank in ranks if self._host(rank) == host)
        what = (
            f"Host {host} with rank(s) {own} does not respond any more "
            "(switched off, cut off the network, or all its processes were killed)."
        )
        todo = f"repair {host} or leave it out with --exclude {host}; {AGAIN}"
        return self._failure(what, self._log(ranks[0]), todo=todo)

    def _never_started(self, ranks: list[int], returncode: int | None) -> RankFailure:
        """Return the error of ranks that did not start: in time, or before the starting process left."""
        by_host: dict[str, list[str]] = {}
        for rank in ranks:
            by_host.setdefault(self._host(rank), []).append(str(rank))
        where = "; ".join(f"rank(s) {', '.join(numbers)} on {host}" for host, numbers in by_host.items())
        within = f" within {self.start_s:.0f} s" if self.start_s else ""
        return self._failure(
            f"{len(ranks)} of {self.plan.ranks} ranks never started{within}: {where}.",
            self.log_dir / LAUNCHER_LOG,
            f"exit code {returncode} of the launcher",
            "see what keeps them there; where they only need more time, set launch.start_s",
        )

    def _silent(self, silent: list[int], echoes: list[dict[str, Any]], returncode: int | None) -> RankFailure:
        """Return the error of ranks that said nothing about their end, with what the others met."""
        rank, others = silent[0], f" (and ranks {silent[1:]})" if len(silent) > 1 else ""
        name, at = self._last[rank]
        facts = f"exit code {returncode} of the launcher; its last event was {name}, {time.monotonic() - at:.0f} s ago"
        if echoes:
            first = echoes[0]
            facts += f"; rank {first['rank']} on {first['host']} then met: {first['message'].splitlines()[0][:300]}"
        place = self._place(rank, self._host(rank))
        what = f"Rank {rank} on {place}{others} went silent: hung, killed, or without a way to report."
        return self._failure(what, self._log(rank), facts)

    def _log(self, rank: int) -> Path:
        return self.log_dir / log_path(Path(), "", rank).name

    def _failure(self, what: str, log: Path, facts: str = "", todo: str = AGAIN) -> RankFailure:
        """Return an error with the end of a log."""
        return RankFailure(what, where=str(log), found=f"{facts}\n{tail_of(log)}", todo=todo)


def is_echo(event: Mapping[str, Any]) -> bool:
    """Return whether a failure that a rank reported follows from another rank's end."""
    return bool(ECHO.search(str(event.get("message", ""))))


def tail_of(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of a text file, indented; empty if there is none."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(f"    | {line}" for line in text[-lines:])
