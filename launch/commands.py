"""What each command of `nd` does on the launching machine: check first, plan, start, report how it ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.hosts import Host, free_port, limit_slots, num_local_gpus, num_slots, read_hostfile
from launch.plan import (
    LAUNCHERS,
    LaunchPlan,
    MpiFlavour,
    RankProgram,
    Tools,
    deepspeed_plan,
    mpirun_plan,
    single_plan,
)
from launch.preflight import preflight
from launch.recipe import config_yaml, load_recipe, write_config
from launch.run import Launch, run_plan
from launch.watch import Watcher
from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.events import events_path

LEASED = ("evaluate", "sweep", "estimate")
NO_MPI_NOTE = "no MPI runtime was found: one process does the work of all ranks (pip install mpich)"


@dataclass(frozen=True)
class LaunchOptions:
    """The options that every launching command takes (see `nd train --help`)."""

    ranks: int | None = None
    hostfile: Path | None = None
    launcher: str = "auto"


def find_tools() -> Tools:
    """Return what this machine has for starting ranks; the environment's own mpirun comes first."""
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun") or ""
    return Tools(sys.executable, mpirun, _mpi_flavour(mpirun), free_port())


def _mpi_flavour(mpirun: str) -> MpiFlavour:
    """Return which MPI an mpirun belongs to."""
    if not mpirun:
        return "mpich"
    answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
    return "openmpi" if "Open MPI" in answer else "mpich"


def make_plan(command: str, config: Config, options: LaunchOptions, tools: Tools, launch_id: str) -> LaunchPlan:
    """Return the plan of a command: which launcher starts how many ranks where.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, or fewer slots than ranks.
    """
    if options.launcher not in LAUNCHERS:
        raise ConfigError("Unknown launcher.", where=options.launcher, expected=", ".join(LAUNCHERS))
    wrong = "mpirun" if command == "train" else "deepspeed-pdsh"
    if options.launcher == wrong:
        raise ConfigError(f"`{wrong}` does not start `nd {command}`.", todo="leave --launcher out")
    if options.launcher == "local" and options.hostfile is not None:
        raise ConfigError("The launcher `local` uses this machine only.", todo="leave --hostfile or --launcher out")
    hosts = _hosts(config, options)
    config_path = (config.run_dir / "config.yaml").resolve()
    program = RankProgram(f"launch.{command}_rank", config_path, launch_id, is_leased=command in LEASED)
    env = rank_environment(config)
    if options.hostfile is None and num_slots(hosts) == 1:
        return single_plan(program, tools, env)
    if command == "train":
        return deepspeed_plan(program, tools, env, hosts, options.hostfile)
    if not tools.mpirun and options.hostfile is None and options.launcher != "mpirun":
        return single_plan(program, tools, env, note=NO_MPI_NOTE)
    return mpirun_plan(program, tools, env, hosts, options.hostfile)


def _hosts(config: Config, options: LaunchOptions) -> tuple[Host, ...]:
    """Return the hosts and slots to use: --ranks, then launch.ranks, then every slot or GPU."""
    ranks = options.ranks or config.launch.ranks
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
        return limit_slots(hosts, ranks) if ranks else hosts
    return (Host("localhost", ranks or max(1, num_local_gpus())),)


def rank_environment(config: Config) -> dict[str, str]:
    """Return the variables that every rank is given in addition to the caller's."""
    threads = str(config.launch.threads_per_rank)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def new_launch_id(command: str) -> str:
    """Return a name for a launch that no other launch of this run has."""
    return f"{command}-{time.time_ns()}-{os.getpid()}"


def launch_command(command: str, config: Config, options: LaunchOptions, console: Console | None = None) -> None:
    """Check, write the config, start the ranks of a command and follow them to the end.

    Raises:
        NdDistError: see ``launch.run.run_plan`` and ``launch.preflight``.
    """
    console = console or Console()
    launch_id = new_launch_id(command)
    plan = make_plan(command, config, options, find_tools(), launch_id)
    preflight(command, config, plan.ranks)
    write_config(config)
    if plan.note:
        console.print(f"  note: {plan.note}", highlight=False)
    started = time.monotonic()
    lost = run_plan(Launch(command, config.run_dir, launch_id, plan), Watcher(console), environment())
    if lost:
        console.print(f"  note: ranks {lost} died on the way; the others did their work", highlight=False)
    seconds = time.monotonic() - started
    console.print(f"  {command}: done by {plan.ranks} rank(s) in {seconds:.1f} s -> {result_of(command, config)}")


def environment() -> Mapping[str, str]:
    """Return the environment for child processes: the caller's, with this package importable from anywhere."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in (root, path) if part)}


def result_of(command: str, config: Config) -> Path:
    """Return the path that a command leaves for the user to look at."""
    results = {
        "pack": config.shards_dir / "index.json",
        "train": config.run_dir / "checkpoints",
        "estimate": events_path(config.run_dir, 0),
    }
    return results.get(command, config.run_dir / "metrics.json")


def dry_run_command(command: str, config: Config, options: LaunchOptions) -> None:
    """Print what a command would run: configuration, hosts and the exact command line; start nothing."""
    console = Console(soft_wrap=True)
    tools = find_tools()
    plan = make_plan(command, config, options, tools, f"{command}-LAUNCH_ID")
    console.print(f"# {config.run_dir / 'config.yaml'}", highlight=False)
    console.print(config_yaml(config), highlight=False, markup=False)
    hosts = ", ".join(f"{host.name} slots={host.slots}" for host in _hosts(config, options))
    console.print(f"# hosts: {hosts}", highlight=False)
    if plan.note:
        console.print(f"# note: {plan.note}", highlight=False)
    console.print(plan.shell(), highlight=False, markup=False)
    if command == "pack":
        from shards.pack import plan_pack

        console.print(f"# {plan_pack(config).describe()}", highlight=False)


def make_phantom(recipe: str, overrides: Sequence[str]) -> None:
    """Write the phantom NSD of a recipe and say what is in it."""
    from shards.phantom.write import write_phantom

    config = load_recipe(recipe, overrides)
    summary = write_phantom(config.nsd_root, config.phantom, config.seed)
    Console(soft_wrap=True).print(f"  phantom: {summary.describe()} -> {config.nsd_root}", highlight=False)


def run_verify(shards_dir: Path) -> None:
    """Verify packed shards and print each problem.

    Raises:
        DataError: there is a problem.
    """
    from shards.verify import verify

    console = Console(soft_wrap=True)
    problems = verify(shards_dir)
    for problem in problems:
        console.print(f"  {problem}", highlight=False, markup=False)
    if problems:
        raise DataError(
            f"{len(problems)} problem(s) in the shards.",
            where=str(shards_dir),
            todo=f"`nd verify {shards_dir} --repair` removes what is damaged, `nd pack` makes it again",
        )
    console.print(f"  verify: every shard and table of {shards_dir} is as its index says", highlight=False)


def run_repair(shards_dir: Path) -> None:
    """Remove damaged shards with their receipts and say what to run next."""
    from shards.repair import repair

    console = Console(soft_wrap=True)
    removed = repair(shards_dir)
    for path in removed:
        console.print(f"  removed {path}", highlight=False, markup=False)
    todo = "run `nd pack` with the same recipe: it makes just these again" if removed else "nothing was damaged"
    console.print(f"  repair: {todo}", highlight=False)


def run_report(run_dir: Path, trackers: Sequence[str] = ()) -> None:
    """Write the report of a run and print where it is; log its numbers where trackers are named.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    from nd_dist.evaluation.report import write_report
    from nd_dist.evaluation.tracking import TRACKERS, log_run

    if unknown := sorted(set(trackers) - set(TRACKERS)):
        raise ConfigError("Unknown tracker.", where=", ".join(unknown), expected=" or ".join(TRACKERS))
    console = Console(soft_wrap=True)
    console.print(f"  report: {write_report(run_dir)}", highlight=False)
    for tracker in trackers:
        console.print(f"  {tracker}: {log_run(run_dir, tracker)}", highlight=False)


def run_conformance_table(directory: Path) -> int:
    """Run every reference case of a folder, print the table; return 0 only if all hold."""
    from launch.tables import conformance_table
    from nd_dist.conformance import run_conformance

    rows = run_conformance(directory)
    Console(soft_wrap=False, width=160 if not Console().is_terminal else None).print(conformance_table(rows))
    return 0 if rows and all(row.ok for row in rows) else 1


def run_merge(out_dir: Path, run_dirs: Sequence[Path]) -> None:
    """Join evaluated runs into one run folder and write its report."""
    from nd_dist.evaluation.merge import merge_runs

    console = Console(soft_wrap=True)
    console.print(f"  merge: {merge_runs(out_dir, run_dirs)} point(s) -> {out_dir / 'metrics.json'}", highlight=False)
    run_report(out_dir)
