"""The rank boundary: what every rank program does around its own work. One of the two places that catch errors.

A rank is given one config file and the launch's id. It writes its output to its own log, its facts to its own event
file, says at the end that it is done (the launcher believes only that, never an exit code), and goes away when the
launcher is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.liveness import Heartbeat, hold_rank_lock
from nd_dist.config import Config
from nd_dist.errors import NdDistError, RankFailure, Requeue
from nd_dist.events import EventLog
from nd_dist.world import World

WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Rank:
    """What a rank's work is given.

    Args:
        config: The validated recipe.
        world: Who this rank is.
        events: This rank's event file.
        should_stop: Whether the scheduler or the user asked to save and stop (SIGTERM, SIGUSR1, SIGINT).
    """

    config: Config
    world: World
    events: EventLog
    should_stop: Callable[[], bool]


def log_path(run_dir: Path, command: str, rank: int) -> Path:
    """Return the file that takes a rank's standard output and error."""
    return run_dir / "logs" / command / f"rank-{rank:04d}.log"


def run_rank(command: str, work: Callable[[Rank], None], arguments: Sequence[str] | None = None) -> None:
    """Run one rank of a command and end the process with its exit code.

    Args:
        command: Name of the command (``pack``, ``train``, ...).
        work: What this rank does; returns when done, raises an ``NdDistError`` when it cannot.
        arguments: Command line (default: this process's).
    """
    parser = argparse.ArgumentParser(prog=f"python -m launch.{command}_rank")
    parser.add_argument("config", type=Path)
    parser.add_argument("launch", help="id of the launch that this rank belongs to")
    options = parser.parse_args(arguments)

    from launch.recipe import load_recipe

    config = load_recipe(str(options.config))
    world = World.from_env(os.environ)
    _redirect_output(log_path(config.run_dir, command, world.rank))
    events = EventLog(config.run_dir, world.rank, command)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if world.family == "pmi":  # MPICH tells the survivors of a dead rank with SIGUSR1; they go on
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    lock = hold_rank_lock(config.run_dir)
    heartbeat = Heartbeat(config.run_dir, options.launch)
    threading.Thread(target=_leave_with_launcher, args=(heartbeat, events), daemon=True).start()
    events.write("rank_start", launch=options.launch, host=socket.gethostname(), pid=os.getpid(), size=world.size)
    code = _guarded(work, Rank(config, world, events, stop.is_set), options.launch)
    os.close(lock)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed and MPI threads abort now and then in interpreter shutdown, after all work is done


def _guarded(work: Callable[[Rank], None], rank: Rank, launch: str) -> int:
    """Return the exit code of the rank's work, after writing how it ended to the events."""
    try:
        work(rank)
    except NdDistError as error:
        kind, code, message = type(error).__name__, error.exit_code, str(error)
        traceback.print_exc()
    except (KeyboardInterrupt, SystemExit) as error:
        kind, code, message = type(error).__name__, Requeue.exit_code, "the rank was interrupted"
    except Exception as error:  # noqa: BLE001 - the rank boundary: whatever happens is reported once, here
        kind, code, message = type(error).__name__, RankFailure.exit_code, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    else:
        rank.events.write("rank_done", launch=launch)
        return 0
    rank.events.write(
        "rank_failed",
        launch=launch,
        kind=kind,
        exit_code=code,
        message=message,
        host=socket.gethostname(),
    )
    return code


def _redirect_output(path: Path) -> None:
    """Send this process's standard output and error, C libraries' included, to its own log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _leave_with_launcher(heartbeat: Heartbeat, events: EventLog) -> None:
    """End this process when the launcher is gone, so that nothing trains on unwatched."""
    while heartbeat.is_alive():
        time.sleep(WATCH_INTERVAL_S)
    events.write("launcher_gone")
    os._exit(RankFailure.exit_code)
