"""Runs the grid of trainings: one `nd train` for each, as many at a time as there are places, until all are done.

A training is a command of its own in its own run folder: it resumes, saves on a signal and is believed like any other.
The same command again goes on with what is not done.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.console import make_console
from launch.grid.plan import (
    GridRequest,
    Point,
    Slot,
    State,
    Training,
    blocked,
    file_name,
    grid_table,
    next_starts,
    plan_grid,
    plan_slots,
    subject_dir,
)
from launch.grid.process import SSH_FAILED, TrainingProcess, command_of, slot_variables
from launch.grid.state import grid_checks, outcome_of, share_of, state_on_disk, validations_of
from launch.host_agents.agents import HostAgents, Inquiry, require_hosts
from launch.plans.allocation import unused_nodes
from launch.plans.choose import LaunchOptions, listed_hosts, new_launch_id, require_fitting, require_head
from launch.plans.environment import SECRET, environment
from launch.plans.hosts import Host, filter_hosts, num_local_gpus
from launch.recipe import config_yaml
from launch.supervise.lock import RunFolder, state_dir
from launch.supervise.outcome import tail_of
from launch.supervise.preflight import require
from launch.supervise.stop import StopSignal
from nd_dist.config import Config
from nd_dist.errors import ConfigError, RankFailure, Requeue
from nd_dist.files import write_json, write_text
from nd_dist.training.records import BEST, MODEL, model_dir, stage_dir, write_best

POLL_S = 0.5
_COMPARED = ("subject", "network", "stage", "settings", "images", "last", "best", "best_step")
BEST_OF_ALL = f"{BEST}-of-all"


@dataclass
class Grid:
    """What runs, and how everything stands.

    Args:
        config: The grid's recipe.
        plan: Its trainings.
        slots: Places for them.
        ranks: Ranks of one training.
        launch_id: This grid's, by which hosts know what belongs to it.
        note: What a user should know about the places; empty if nothing.
        states: How each training stands.
        running: Those that run.
        lost_hosts: Hosts that do not respond any more.
    """

    config: Config
    plan: tuple[Training, ...]
    slots: tuple[Slot, ...]
    ranks: int
    launch_id: str
    note: str = ""
    states: dict[Training, State] = field(default_factory=dict)
    running: dict[Training, TrainingProcess] = field(default_factory=dict)
    lost_hosts: set[str] = field(default_factory=set)

    @property
    def recipe_path(self) -> Path:
        """The grid's recipe on disk, which every training is given with its own overrides."""
        return self.config.run_dir / "grid.yaml"

    def log_path(self, training: Training) -> Path:
        """Return the file that takes a training's launcher output."""
        return self.config.run_dir / "logs" / "grid" / f"{file_name(training.name)}.log"

    def words(self, training: Training) -> list[str]:
        """Return the words of a training's command, after the Python that runs it."""
        words = ["-m", "launch.cli", "train", str(self.recipe_path.resolve())]
        return [*words, *training.overrides, "--ranks", str(self.ranks)]

    def command(self, slot: Slot, training: Training) -> list[str]:
        """Return the command of a training in a slot."""
        return command_of(slot, self.words(training), self.launch_id, environment(), self.config.launch.carry)

    def free_slots(self) -> list[Slot]:
        """Return the slots without a training, on hosts that answer."""
        taken = {process.slot for process in self.running.values()}
        return [slot for slot in self.slots if slot not in taken and slot.host not in self.lost_hosts]

    def shares(self) -> dict[Training, float]:
        """Return the share of its steps that each training has made."""
        return {training: share_of(training, self.states[training]) for training in self.plan}


def grid_command(config: Config, request: GridRequest, options: LaunchOptions) -> None:
    """Train the grid of a request.

    Raises:
        NdDistError: see ``run_grid``, ``make_grid`` and ``grid_checks``.
    """
    grid = make_grid(config, request, options)
    require(grid_checks(config, grid.plan, grid.ranks))
    run_grid(grid, make_console())


def make_grid(config: Config, request: GridRequest, options: LaunchOptions) -> Grid:
    """Return the grid of a request, with nothing started; ``options.ranks`` are those of one training.

    Raises:
        ConfigError: an option that the grid cannot honour; a subject or a host that there is not.
    """
    require_head("train", os.environ)
    require_fitting("train", options)
    if options.launcher not in ("auto", "local"):
        raise ConfigError(
            "Every training of the grid runs on one host, and a launcher over hosts cannot be chosen.",
            where=f"--launcher {options.launcher}",
            todo="leave it out; `nd submit train --all-targets` submits the trainings as Slurm jobs",
        )
    request = replace(request, ranks=options.ranks or config.launch.ranks or 1)
    hosts, gpus, note = listed_hosts(options, {}, None), 1, ""
    if not hosts:
        gpus, note = num_local_gpus(), unused_nodes(os.environ)
        hosts = (Host("localhost", gpus or request.ranks),)
    hosts = filter_hosts(hosts, options.include, options.exclude)
    is_local = len(hosts) == 1 and hosts[0].is_local
    if shown := [name for name in config.launch.carry if not is_local and SECRET.search(name)]:
        raise ConfigError("The grid would show these values on command lines.", where="launch.carry", found=shown)
    slots = plan_slots(hosts, request, gpus > 0, is_local)
    return Grid(config, plan_grid(config, request), slots, request.ranks, new_launch_id("grid"), note)


def show_grid(grid: Grid, console: Console) -> None:
    """Print the table and every command, and start nothing."""
    grid.states = dict.fromkeys(grid.plan, "waiting")
    console.print(grid_table(grid.plan, grid.states, grid.shares()), soft_wrap=False)
    for training in grid.plan:
        command = grid.command(grid.slots[0], training)
        console.print(shlex.join(command))
    places = ", ".join(f"{slot.host}:{','.join(map(str, slot.devices)) or 'cpu'}" for slot in grid.slots)
    console.print(f"# {len(grid.plan)} trainings on {len(grid.slots)} places: {places}")
    if grid.note:
        console.print(f"# note: {grid.note}")


def run_grid(grid: Grid, console: Console) -> None:
    """Train everything that is not done, then make each subject's decoder of all targets.

    Raises:
        Requeue: stopped by a signal; every training has saved its state.
        RankFailure: some trainings failed; the others are done.
        CheckpointError: a run folder holds another recipe's training.
        WorldError: a host cannot take part.
    """
    from shards.format.splits import open_index

    folder = RunFolder(grid.config.run_dir, grid.launch_id)
    if grid.note:
        console.print(f"  note: {grid.note}")
    try:
        write_text(grid.recipe_path, config_yaml(grid.config))
        index = open_index(grid.config)
        grid.states = {training: state_on_disk(grid.config, training, index) for training in grid.plan}
        with _agents_of(grid) as agents, folder.stop as stop, _board(grid, console):
            if agents is not None:
                require_hosts(agents.facts())
            _work(grid, agents, stop, console)
        console.print(grid_table(grid.plan, grid.states, grid.shares()), soft_wrap=False)
        _judge(grid, stop)
        for point, subject in dict.fromkeys((training.point, training.subject) for training in grid.plan):
            _merge(grid, point, subject, console)
        if any(training.point for training in grid.plan):
            _compare(grid, console)
    finally:
        folder.release()


def _agents_of(grid: Grid) -> AbstractContextManager[HostAgents | None]:
    """Return agents for the hosts that ssh reaches: they are checked first, watched, and cleared at the end."""
    names = dict.fromkeys(slot.host for slot in grid.slots if not slot.is_local)
    if not names:
        return nullcontext()
    shared_dir = state_dir(grid.config.run_dir).resolve()
    inquiry = Inquiry(grid.launch_id, shared_dir, ranks_meet=False)
    logs = grid.config.run_dir / "logs" / "grid"
    return HostAgents([Host(name, 1) for name in names], inquiry, logs, environment(), always_ssh=True)


def _work(grid: Grid, agents: HostAgents | None, stop: StopSignal, console: Console) -> None:
    """Start and reap trainings until none is left; signals are passed on to those that run."""
    num_told = 0
    while True:
        _lose(grid, agents.lost() if agents is not None else (), console)
        _reap(grid, console)
        if stop.count > num_told:  # one at a time: signals that follow each other at once are one signal
            num_told += 1
            for process in grid.running.values():
                process.ask_to_stop()
        if not stop.name:
            for training, slot in next_starts(grid.plan, grid.states, grid.free_slots()):
                _start(grid, training, slot)
                where = " ".join([slot.host, *slot_variables(slot)])
                console.print(f"  {training.name}: running on {where}")
        if not grid.running:
            return
        time.sleep(POLL_S)


def _lose(grid: Grid, lost: Iterable[str], console: Console) -> None:
    """Give up what runs on hosts that do not answer any more; their own agents clear them."""
    for host in set(lost) - grid.lost_hosts:
        console.print(f"  host {host} does not respond any more")
        grid.lost_hosts.add(host)
        for process in grid.running.values():
            if process.slot.host == host:
                process.give_up()


def _reap(grid: Grid, console: Console) -> None:
    """Take note of the trainings that ended, and of those that can no longer start."""
    codes = {training: process.poll() for training, process in grid.running.items()}
    for training, code in codes.items():
        if code is not None:
            process = grid.running.pop(training)
            process.close()
            if code == SSH_FAILED and not process.slot.is_local:
                _lose(grid, [process.slot.host], console)
            grid.states[training] = outcome_of(training, code)
            console.print(f"  {training.name}: {grid.states[training]}")
    for training in blocked(grid.plan, grid.states):
        grid.states[training] = "blocked"


def _start(grid: Grid, training: Training, slot: Slot) -> None:
    """Start one training."""
    log = grid.log_path(training)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = grid.command(slot, training)
    grid.running[training] = TrainingProcess(slot, command, environment(), log)
    grid.states[training] = "running"


def _judge(grid: Grid, stop: StopSignal) -> None:
    """Raise what explains a grid that is not done."""
    left = [training for training in grid.plan if grid.states[training] != "done"]
    failed = [training for training in left if grid.states[training] == "failed"]
    if stop.name:
        unsaved = f" but {', '.join(t.name for t in failed)}" if failed else ""
        raise Requeue(
            f"Stopped by {stop.name}; every training{unsaved} saved its state.", todo="run the command again"
        )
    if not left:
        return
    lost = f" Hosts that do not respond any more: {', '.join(sorted(grid.lost_hosts))}." if grid.lost_hosts else ""
    log = grid.log_path((failed or left)[0])
    raise RankFailure(
        f"{len(failed)} of {len(grid.plan)} trainings failed: {', '.join(t.name for t in failed)}.{lost}",
        where=str(log),
        found=tail_of(log),
        todo="fix the cause, then run the same command again: finished work is kept",
    )


def _merge(grid: Grid, point: Point, subject: int, console: Console) -> None:
    """Write the decoder of all of a subject's networks, and of the best of each, where `nd evaluate` looks for it."""
    from nd_dist.models.decoder import Decoder

    own = [training for training in grid.plan if (training.point, training.subject) == (point, subject)]
    last, run_dir = max(training.stage for training in own), subject_dir(grid.config, subject, point)
    parts = [stage_dir(training.run_dir, last) for training in own if training.stage == last]
    folder = stage_dir(run_dir, last)
    if parts != [folder]:
        Decoder.merged([model_dir(part, "last") for part in parts]).save(folder / MODEL)
        best = [model_dir(part, "best") for part in parts]
        if all(part.is_dir() for part in best):
            Decoder.merged(best).save(folder / BEST_OF_ALL)
            write_best(folder, BEST_OF_ALL, 0, {})
    console.print(
        f"  {' '.join([*point, f'subject {subject}'])}: decoder of {len(parts)} network(s) -> {folder / MODEL}"
    )


def _compare(grid: Grid, console: Console) -> None:
    """Print what the validations of all points found, the best of a network first, and write it to ``grid.json``."""
    rows: list[dict[str, Any]] = []
    for training in grid.plan:
        if found := validations_of(training):
            best = min(found, key=lambda event: float(event["values"]["loss"]))
            losses = {"last": float(found[-1]["values"]["loss"]), "best": float(best["values"]["loss"])}
            named = {"subject": training.subject, "network": training.network, "stage": training.stage}
            where = {"settings": list(training.point), "images": found[-1]["split"], **named}
            rows.append({**where, **losses, "best_step": best["step"], "run_dir": str(training.run_dir)})
    rows.sort(key=lambda row: (row["subject"], row["network"], row["stage"], row["best"]))
    table = Table("subject", "network", "stage", "settings", "images", "last loss", "best loss", "at step")
    for row in rows:
        cells = {
            **row,
            "settings": " ".join(row["settings"]),
            "last": f"{row['last']:.4g}",
            "best": f"{row['best']:.4g}",
        }
        table.add_row(*(str(cells[name]) for name in _COMPARED))
    console.print(table, soft_wrap=False)
    write_json(grid.config.run_dir / "grid.json", {"trainings": rows})


def _board(grid: Grid, console: Console) -> AbstractContextManager[object]:
    """Return what keeps the table on the screen up to date; nothing where there is no terminal."""
    if not console.is_terminal:
        return nullcontext()

    def table() -> Table:
        return grid_table(grid.plan, grid.states, grid.shares())

    return Live(get_renderable=table, console=console, refresh_per_second=1, transient=True)
