"""What every rank does around its own work: ``python -m launch.ranks.rank MODULE CONFIG LAUNCH_ID``.

The rank boundary, one of the two places that catch errors. A rank is given one config file and the launch's id; its
working folder and environment stand in the launcher's record beside the config. It writes its output to its own log
and its facts to its own event file, says at the end that it is done (the launcher believes only that, never an exit
code), and its guard ends it when the launcher is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.plans.plan import text_of_word
from launch.supervise.guard import Guard, fork_rank
from launch.supervise.heartbeat import Heartbeat, launch_record_path, read_record
from launch.supervise.lock import hold_rank_lock
from launch.supervise.outcome import tail_of
from launch.supervise.stop import heeded
from nd_dist.errors import ConfigError, NdDistError, RankFailure, Requeue, WorldError
from nd_dist.events import EventLog, log_path
from nd_dist.world import World

if TYPE_CHECKING:
    import torch

    from nd_dist.config import Config


@dataclass(frozen=True)
class Rank:
    """What a rank's work is given.

    Args:
        config: The validated recipe.
        world: Who this rank is.
        events: This rank's event file.
        should_stop: Whether the scheduler or the user asked to save and stop.
        options: Further words of the launch.
    """

    config: Config
    world: World
    events: EventLog
    should_stop: Callable[[], bool]
    options: tuple[str, ...] = ()

    def use_device(self) -> torch.device:
        """Return this rank's device, made the process's own: every program that holds a network begins with it."""
        from nd_dist.compute.device import note_platform, use_device

        device = use_device(self.world, self.config)
        if self.world.is_main and (moved := note_platform(self.config.run_dir, self.events.command, device)):
            self.events.write("notice", message=moved)
        return device


Work = Callable[[Rank], None]
"""What a rank program's ``work`` does; returns when done, raises an ``NdDistError`` when it cannot."""


@dataclass(frozen=True)
class _Start:
    """What this process was started with."""

    module: str
    config_path: Path
    launch_id: str
    options: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command whose rank this is: ``launch.ranks.train`` -> ``train``."""
        return self.module.rpartition(".")[2]

    @property
    def run_dir(self) -> Path:
        """Folder of the run: the config lies in it."""
        return self.config_path.parent


def interrupt_on_stop() -> None:
    """Let a stop end this rank at once: for work that is kept piece by piece and has nothing to save."""
    for number in heeded((signal.SIGTERM, signal.SIGINT)):
        signal.signal(number, _raise_exit)


def _raise_exit(*_: object) -> None:
    raise SystemExit(Requeue.exit_code)


def refuse_to_run(module: str) -> NoReturn:
    """End a process that was started as a rank, but by nobody whom a rank can report to."""
    command = module.rpartition(".")[2]
    sys.stderr.write(
        f"{module} is no program of its own.\n"
        f"  next: `nd {command} RECIPE`, or under a launcher of your own `python -m launch.join {command} RECIPE`\n"
    )
    sys.exit(ConfigError.exit_code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank and end the process with its exit code."""
    words = [text_of_word(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    module, config, launch_id, *options = [*words, "", "", ""] if len(words) < 3 else words
    start = _Start(module, Path(config), launch_id, tuple(options))
    record = read_record(launch_record_path(start.run_dir))
    if not record:
        refuse_to_run(start.module)
    os.chdir(record["cwd"])
    os.environ.update(record["env"])
    world = World.from_env(os.environ)
    events = EventLog(start.run_dir, world.rank, start.command)
    _redirect_output(log_path(start.run_dir, start.command, world.rank))
    has_said_end = mmap.mmap(-1, 1)  # a byte that the rank and its guard share
    pid = fork_rank()
    if pid:
        code = _guard(pid, start, world, events, lambda: has_said_end[0] == 1)
    else:
        code = _run(start, world, events, record["size"] or world.size)
        has_said_end[0] = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed and MPI threads abort now and then in interpreter shutdown, after all work is done


def _guard(pid: int, start: _Start, world: World, events: EventLog, has_said_end: Callable[[], bool]) -> int:
    """Watch the rank; return its exit code."""
    log = log_path(start.run_dir, start.command, world.rank)

    def report(cause: str) -> None:
        with contextlib.suppress(OSError):
            if line := tail_of(log, 1).strip(" |"):
                cause += f"; its log ends with: {line[:200]}"
            events.write("rank_lost", launch=start.launch_id, host=socket.gethostname(), cause=cause)

    heartbeat = Heartbeat(start.run_dir, start.launch_id, world.size)
    return Guard(pid, heartbeat, report, world.family != "pmi", has_said_end).watch()


def _run(start: _Start, world: World, events: EventLog, size: int) -> int:
    """Do the rank's work in a launch of so many ranks, and write to the events how it ended; return the exit code."""
    stop, host = threading.Event(), socket.gethostname()
    for number in heeded((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        signal.signal(number, lambda *_: stop.set())
    if world.family == "pmi":  # MPICH tells the survivors of a dead rank with SIGUSR1; they go on
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        from launch.recipe import load_recipe
        from shards.reading.records import allow_more_open_files

        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("nd_dist").setLevel(logging.INFO)
        allow_more_open_files()
        lock, pid = hold_rank_lock(start.run_dir), os.getpid()
        events.write("rank_start", launch=start.launch_id, host=host, pid=pid, guard=os.getppid(), size=world.size)
        if world.size != size:
            what, found = "The launcher has started another number of ranks than this launch has.", f"{world.size}"
            raise WorldError(what, expected=size, found=f"{found} ({world.family})", todo="look at launcher.log")
        config = load_recipe(str(start.config_path), (), start.command)
        rank = Rank(config, world, events, stop.is_set, start.options)
        _imported(start.module)(rank)
        os.close(lock)
    except NdDistError as error:
        kind, code, message = type(error).__name__, error.exit_code, str(error)
        traceback.print_exc()
    except (KeyboardInterrupt, SystemExit) as error:
        kind, code, message = Requeue.__name__, Requeue.exit_code, "the rank was asked to stop"
        if isinstance(error, SystemExit) and error.code != code:
            kind, code, message = "SystemExit", RankFailure.exit_code, f"the program left with sys.exit({error.code})"
            traceback.print_exc()
    except Exception as error:  # noqa: BLE001 - the rank boundary: whatever happens is reported once, here
        kind, code, message = _unforeseen(error)
        traceback.print_exc()
    else:
        events.write("rank_done", launch=start.launch_id)
        return 0
    with contextlib.suppress(OSError):  # the disk may be what failed; the launcher then names this rank as silent
        events.write("rank_failed", launch=start.launch_id, kind=kind, exit_code=code, message=message, host=host)
    return code


def _imported(module: str) -> Work:
    """Return a rank's work. Half a million objects of torch and diffusers stay; no garbage is looked for in them."""
    gc.disable()
    work: Work = importlib.import_module(module).work
    gc.freeze()
    gc.enable()
    return work


def _unforeseen(error: Exception) -> tuple[str, int, str]:
    """Return kind, exit code and message of an error that nobody named; full memory gets advice."""
    if "torch" in sys.modules:
        from nd_dist.compute.chunks import full_memory, is_memory_error

        if is_memory_error(error):
            return RankFailure.__name__, RankFailure.exit_code, str(full_memory(error))
    return type(error).__name__, RankFailure.exit_code, f"{type(error).__name__}: {error}"


def _redirect_output(path: Path) -> None:
    """Send this process's standard output and error, C libraries' included, to its own log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main()
