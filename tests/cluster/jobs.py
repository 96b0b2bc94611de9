"""Runs `nd` on a host of a test cluster, follows it by its events, and looks at what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nd_dist.events import events_path, read_events
from tests.cluster.hosts import Cluster, children_of
from tests.support.command_line import ND
from tests.support.waiting import HANG_S, wait_until

TINY = [
    "phantom.num_subjects=3", "phantom.num_sessions=2", "phantom.trials_per_session=24", "phantom.num_shared=6",
    "phantom.num_voxels=60", "data.subjects=[1,2,3]", "decoder.kind=neuraldiffuser", "decoder.hidden_size=16",
    "training.steps=[24,4]", "training.samples_per_subject=[4,8]", "training.checkpoint_every=8",
    "sampler.num_steps=4", "sampler.kappa=10", "evaluation.num_images=4", "evaluation.controls=false",
    "evaluation.num_repeats=1", "evaluation.batch_size=1", "evaluation.bootstrap=100", "evaluation.baseline=false",
    "evaluation.image_groups=null", "evaluation.image_classes=null",
    "sweep.num_images=2", "sweep.kappa=[10]", "sweep.eta=[0.5,1.0]",
    f"launch.timeout_s={2 * HANG_S}", f"launch.stop_grace_s={HANG_S}",
]  # fmt: skip


def require_launcher(launcher: str) -> None:
    """Skip the test where the launcher's program is missing."""
    if launcher == "deepspeed-openmpi" and shutil.which("ompi_info") is None:
        pytest.skip("needs Open MPI (package openmpi-bin)")


def words_of(folder: Path, **more: object) -> list[str]:
    """Return the overrides of the very small recipe, with its folders below ``folder``."""
    places = {"nsd_root": folder / "nsd", "shards_dir": folder / "shards", "run_dir": folder / "run"}
    return [*TINY, *(f"{key.replace('__', '.')}={value}" for key, value in {**places, **more}.items())]


def hostfile(folder: Path, *lines: str) -> Path:
    """Write a hostfile and return its path."""
    path = folder / f"hosts-{len(lines)}-{time.time_ns()}"
    path.write_text("\n".join(lines) + "\n")
    return path


class Job:
    """One `nd` command that runs on a host.

    Args:
        cluster: Where.
        host: The launching host.
        words: Words after ``nd``.
        run_dir: The run folder whose events are read.
    """

    def __init__(self, cluster: Cluster, host: str, words: Sequence[str], run_dir: Path, **options: object) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        self.before = {path: path.stat().st_size for path in run_dir.glob("events/*.jsonl")}
        self.process = cluster.popen(host, [*ND, *words], stderr=subprocess.STDOUT, **options)

    @property
    def launcher(self) -> int:
        """The `nd` process itself, as this machine counts (nsenter is its parent)."""
        return next(iter(children_of(self.process.pid)), self.process.pid)

    def signal(self, number: int) -> None:
        """Send a signal to `nd`."""
        os.kill(self.launcher, number)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        try:
            text, _ = self.process.communicate(timeout=HANG_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.launcher, signal.SIGKILL)
            self.process.kill()
        return self.process.returncode, text

    def events(self, rank: int) -> list[dict[str, Any]]:
        """Return the events that a rank wrote during this job."""
        path = events_path(self.run_dir, rank)
        events = list(read_events(path))
        lines = path.read_bytes()[: self.before.get(path, 0)].count(b"\n") if path.exists() else 0
        return events[lines:]

    def wait_for(self, rank: int, event: str, **fields: object) -> dict[str, Any]:
        """Wait until a rank has written an event and return it."""

        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None, self.process.communicate()[0]
            same = [each for each in self.events(rank) if each["event"] == event]
            return [each for each in same if all(each.get(key) == value for key, value in fields.items())]

        return wait_until(found, f"event {event} of rank {rank}", pause_s=0.1)[0]

    def pid_of(self, rank: int) -> int:
        """Return a rank's process as this machine counts: its event has the number that its host counts."""
        start = self.wait_for(rank, "rank_start")
        host = self.cluster.hosts[start["host"]]
        for pid in host.processes():
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if numbers[-1] == str(start["pid"]):
                return pid
        raise AssertionError(f"rank {rank} does not run")


def run_nd(cluster: Cluster, host: str, *words: str, **options: object) -> str:
    """Run `nd` on a host, require success, return its output."""
    result = cluster.run(host, [*ND, *words], **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wait_until_clear(cluster: Cluster) -> None:
    """Wait until no host runs anything of a launch."""

    def is_clear() -> bool:
        return not any(host.leftovers() for host in cluster.hosts.values())

    try:
        wait_until(is_clear, "every process gone on every host", pause_s=0.1)
    except AssertionError as error:
        left = {name: host.leftovers() for name, host in cluster.hosts.items()}
        raise AssertionError(f"{error}: {left}") from None


def end_of(job: Job, fault: str, since: float) -> tuple[int, str]:
    """Wait until `nd` has ended and no host runs anything of it; return exit code and message.

    How long that took is recorded, not asserted; what would end a launch of itself takes longer than a test waits.
    """
    code, text = job.finish()
    ended = time.monotonic() - since
    wait_until_clear(job.cluster)
    cleared = time.monotonic() - since
    record(fault=fault, nd_ends_s=round(ended, 1), all_gone_s=round(cleared, 1), exit_code=code)
    return code, text


def record(**facts: object) -> None:
    """Append measured facts to the file that ND_FAULT_TIMES names, with the machine's load."""
    if path := os.environ.get("ND_FAULT_TIMES"):
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({**facts, "load": round(os.getloadavg()[0], 1)}) + "\n")


def record_start(what: str, run_dir: Path, command: str, ranks: int) -> None:
    """Record how long a finished launch took until every rank ran, and until the last one was done."""
    events = [event for rank in range(ranks) for event in read_events(events_path(run_dir, rank))]
    starts = [event for event in events if event["event"] == "rank_start" and event["command"] == command]
    launch = starts[-1]["launch"]
    began = int(launch.split("-")[1]) / 1e9  # the launch's id holds its time
    mine = [event for event in events if event.get("launch") == launch]
    all_run = max(event["time"] for event in mine if event["event"] == "rank_start") - began
    all_done = max(event["time"] for event in mine if event["event"] == "rank_done") - began
    record(start=what, all_ranks_run_s=round(all_run, 1), all_ranks_done_s=round(all_done, 1))


def metrics_points(run_dir: Path) -> Any:
    """Return the numbers of a run's metrics.json."""
    return json.loads((run_dir / "metrics.json").read_text())["points"]


def losses(events: Sequence[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """Return the loss of every training step."""
    return {(e["stage"], e["step"]): e["loss"] for e in events if e["event"] == "train_step"}
