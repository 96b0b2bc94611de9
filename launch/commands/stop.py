"""`nd stop RUN`: asks a running launch to save and stop, waits until it has, and says how it stands."""

from __future__ import annotations

import time
from pathlib import Path

from launch.commands.status import describe_runs, find_runs, status_of
from launch.console import make_console
from launch.supervise.heartbeat import ask_launcher, describe_launcher, running_launch
from nd_dist.errors import RankFailure

POLL_S = 0.5


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
            time.sleep(POLL_S)
    else:
        console.print(f"  no launch works in {run_dir}")
    if next(find_runs(run_dir), None) or not launch:
        console.print(describe_runs(run_dir))
    status = status_of(run_dir)
    if launch and status.state == "failed":
        raise RankFailure("The launch failed while it stopped.", where=str(run_dir), found=status.last_error)
