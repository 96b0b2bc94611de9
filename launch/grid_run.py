"""Runs the grid of trainings: one `nd train` for each, as many at a time as there are places, until all are done.

A training is a command of its own in its own run folder: it resumes, saves on a signal and is believed like any other.
The same command again goes on with what is not done.
"""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.commands import environment, new_launch_id
from launch.grid import (
    GridRequest,
    Slot,
    State,
    Training,
    blocked,
    grid_table,
    next_starts,
    plan_grid,
    plan_slots,
    subject_dir,
)
from launch.grid_state import outcome_of, share_of, state_on_disk
from launch.hosts import Host, num_local_gpus, read_hostfile
from launch.liveness import RunFolder
from launch.recipe import config_yaml
from launch.run import tail_of
from launch.stop import StopSignal
from nd_dist.config import Config
from nd_dist.errors import RankFailure, Requeue
from nd_dist.files import write_text
from nd_dist.training.records import MODEL, stage_dir

POLL_S = 0.5
PR_SET_PDEATHSIG = 1


@dataclass
class Grid:
    """What runs, and how everything stands.

    Args:
        config: The grid's recipe.
        plan: Its trainings.
        slots: Places for them.
        ranks: Ranks of one training.
    """

    config: Config
    plan: tuple[Training, ...]
    slots: tuple[Slot, ...]
    ranks: int
    states: dict[Training, State] = field(default_factory=dict)
    running: dict[Training, tuple[subprocess.Popen[bytes], Slot]] = field(default_factory=dict)

    @property
    def recipe_path(self) -> Path:
        """The grid's recipe on disk, which every training is given with its own overrides."""
        return self.config.run_dir / "grid.yaml"

    def log_path(self, training: Training) -> Path:
        """Return the file that takes a training's launcher output."""
        return self.config.run_dir / "logs" / "grid" / f"{training.name.replace(' ', '-')}.log"

    def command(self, training: Training, slot: Slot) -> list[str]:
        """Return the command of a training in a slot: here, or over ssh on the slot's host."""
        words = [sys.executable, "-m", "launch.cli", "train", str(self.recipe_path.resolve())]
        words += [*training.overrides, "--ranks", str(self.ranks)]
        if slot.is_local:
            return words
        variables = [f"PYTHONPATH={environment()['PYTHONPATH']}", *_visible(slot)]
        remote = f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*variables, *words])}"
        # a terminal, so that the remote launcher gets SIGHUP (and saves) when this end goes away
        return ["ssh", "-tt", "-o", "BatchMode=yes", slot.host, remote]

    def free_slots(self) -> list[Slot]:
        """Return the slots without a training."""
        taken = {slot for _, slot in self.running.values()}
        return [slot for slot in self.slots if slot not in taken]

    def shares(self) -> dict[Training, float]:
        """Return the share of its steps that each training has made."""
        return {training: share_of(training, self.states[training]) for training in self.plan}


def grid_command(config: Config, request: GridRequest, hostfile: Path | None, is_dry: bool) -> None:
    """Train the grid of a request, or show what that would run.

    Raises:
        NdDistError: see ``run_grid`` and ``launch.grid``.
    """
    console = Console()
    grid = make_grid(config, request, hostfile)
    if is_dry:
        show_grid(grid, Console(soft_wrap=True))
    else:
        run_grid(grid, console)


def make_grid(config: Config, request: GridRequest, hostfile: Path | None) -> Grid:
    """Return the grid of a request, with nothing started."""
    hosts = (Host("localhost", num_local_gpus()),) if hostfile is None else read_hostfile(hostfile)
    has_gpus = hostfile is not None or hosts[0].slots > 0
    if not has_gpus:
        hosts = (Host("localhost", request.ranks),)
    slots = plan_slots(hosts, request, has_gpus, is_local=hostfile is None)
    return Grid(config, plan_grid(config, request), slots, request.ranks)


def show_grid(grid: Grid, console: Console) -> None:
    """Print the table and every command, and start nothing."""
    grid.states = dict.fromkeys(grid.plan, "waiting")
    console.print(grid_table(grid.plan, grid.states, grid.shares()))
    for training in grid.plan:
        console.print(shlex.join(grid.command(training, grid.slots[0])), highlight=False, markup=False)
    places = ", ".join(f"{slot.host}:{','.join(map(str, slot.devices)) or 'cpu'}" for slot in grid.slots)
    console.print(f"# {len(grid.plan)} trainings on {len(grid.slots)} places: {places}", highlight=False)


def run_grid(grid: Grid, console: Console) -> None:
    """Train everything that is not done, then make each subject's decoder of all targets.

    Raises:
        Requeue: stopped by a signal; every training has saved its state.
        RankFailure: some trainings failed; the others are done.
        CheckpointError: a run folder holds another recipe's training.
    """
    from shards.index import Index

    folder = RunFolder(grid.config.run_dir, new_launch_id("grid"))
    try:
        write_text(grid.recipe_path, config_yaml(grid.config))
        index_id = Index.read(grid.config.shards_dir).id
        grid.states = {training: state_on_disk(grid.config, training, index_id) for training in grid.plan}
        with StopSignal() as stop, _board(grid, console):
            _work(grid, stop, console)
        console.print(grid_table(grid.plan, grid.states, grid.shares()))
        _judge(grid, stop)
        for subject in dict.fromkeys(training.subject for training in grid.plan):
            _merge(grid, subject, console)
    finally:
        folder.release()


def _work(grid: Grid, stop: StopSignal, console: Console) -> None:
    """Start and reap trainings until none is left; a signal is passed on to those that run."""
    was_told = False
    while True:
        _reap(grid, console)
        if stop.name and not was_told:
            was_told = True
            for process, _ in grid.running.values():
                process.send_signal(signal.SIGTERM)
        if not stop.name:
            for training, slot in next_starts(grid.plan, grid.states, grid.free_slots()):
                _start(grid, training, slot)
                where = " ".join([slot.host, *_visible(slot)])
                console.print(f"  {training.name}: running on {where}", highlight=False)
        if not grid.running:
            return
        time.sleep(POLL_S)


def _reap(grid: Grid, console: Console) -> None:
    """Take note of the trainings that ended, and of those that can no longer start."""
    for training in [training for training, (process, _) in grid.running.items() if process.poll() is not None]:
        process, _ = grid.running.pop(training)
        grid.states[training] = outcome_of(training, process.returncode)
        console.print(f"  {training.name}: {grid.states[training]}", highlight=False)
    for training in blocked(grid.plan, grid.states):
        grid.states[training] = "blocked"


def _start(grid: Grid, training: Training, slot: Slot) -> None:
    """Start one training."""
    log = grid.log_path(training)
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = dict(word.split("=", 1) for word in _visible(slot)) if slot.is_local else {}
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            grid.command(training, slot),
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    grid.running[training] = (process, slot)
    grid.states[training] = "running"


def _die_with_parent() -> None:
    """Let the kernel ask this process to stop (and save) when the grid is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _visible(slot: Slot) -> list[str]:
    """Return the variable that gives a training its GPUs; here they count through those that this process sees."""
    if not slot.devices:
        return []
    seen = environment().get("CUDA_VISIBLE_DEVICES", "") if slot.is_local else ""
    names = seen.split(",") if seen else [str(i) for i in range(max(slot.devices) + 1)]
    return [f"CUDA_VISIBLE_DEVICES={','.join(names[i] for i in slot.devices)}"]


def _judge(grid: Grid, stop: StopSignal) -> None:
    """Raise what explains a grid that is not done."""
    if stop.name:
        raise Requeue(f"Stopped by {stop.name}; every training saved its state.", todo="run the same command again")
    failed = [training for training in grid.plan if grid.states[training] == "failed"]
    if failed:
        raise RankFailure(
            f"{len(failed)} of {len(grid.plan)} trainings failed: {', '.join(t.name for t in failed)}.",
            where=str(grid.log_path(failed[0])),
            found=tail_of(grid.log_path(failed[0])),
            todo="repair the cause, then run the same command again: what is done stays done",
        )


def _merge(grid: Grid, subject: int, console: Console) -> None:
    """Write the decoder of all of a subject's networks where `nd evaluate run_dir=...` looks for it."""
    from nd_dist.models.decoder import Decoder
    from nd_dist.models.statistics import FILE, read_z_statistics, write_z_statistics

    last = max(training.stage for training in grid.plan)
    parts = [t for t in grid.plan if (t.subject, t.stage) == (subject, last)]
    folders = [stage_dir(training.run_dir, last) / MODEL for training in parts]
    target = stage_dir(subject_dir(grid.config, subject), last) / MODEL
    if folders != [target]:
        Decoder.merged(folders).save(target)
        for folder in folders:
            if (folder / FILE).exists():
                write_z_statistics(target, read_z_statistics(folder))
    console.print(f"  subject {subject}: decoder of {len(parts)} network(s) -> {target}", highlight=False)


def _board(grid: Grid, console: Console) -> AbstractContextManager[object]:
    """Return what keeps the table on the screen up to date; nothing where there is no terminal."""
    if not console.is_terminal:
        return nullcontext()

    def table() -> Table:
        return grid_table(grid.plan, grid.states, grid.shares())

    return Live(get_renderable=table, console=console, refresh_per_second=1, transient=True)
