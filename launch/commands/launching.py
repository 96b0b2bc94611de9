"""What each command of `nd` does on the launching machine: check first, plan, start, report how it ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from launch.host_agents.agent import free_port_from
from launch.host_agents.agents import HostAgents, Inquiry, require_hosts, require_port
from launch.pack_recipe import pack_recipe_path, write_pack_recipe
from launch.plans.deepspeed import deepspeed_plan
from launch.plans.hosts import Host, filter_hosts, limit_slots, num_local_gpus, num_slots, read_hostfile
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import (
    LAUNCHERS,
    LaunchPlan,
    MpiFlavour,
    RankProgram,
    Tools,
    carried_environment,
    single_plan,
)
from launch.plans.slurm import allocated_hosts, srun_deepspeed_plan, srun_plan
from launch.recipe import config_yaml, load_recipe, write_config
from launch.supervise.liveness import state_dir
from launch.supervise.preflight import preflight, require_starters
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher
from nd_dist.config import Config, LaunchConfig
from nd_dist.errors import ConfigError
from nd_dist.events import events_path

LEASED = ("evaluate", "sweep", "estimate")
DEEPSPEED = ("train", "phantom_networks")
"""Commands whose ranks DeepSpeed's launcher starts; MPI starts the others'."""
DEFAULT_LAUNCH = LaunchConfig()
NO_MPI_NOTE = "no MPI runtime was found: one process does the work of all ranks (pip install mpich)"


@dataclass(frozen=True)
class LaunchOptions:
    """The options that every launching command takes (see `nd train --help`)."""

    ranks: int | None = None
    hostfile: Path | None = None
    launcher: str = "auto"
    include: str = ""
    exclude: str = ""


def find_tools(launch: LaunchConfig = DEFAULT_LAUNCH) -> Tools:
    """Return what this machine has for starting ranks; the environment's own mpirun comes first.

    Raises:
        WorldError: no port is free where the recipe wants one.
    """
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun") or ""
    flavour = _mpi_flavour(mpirun)
    openmpi = mpirun if flavour == "openmpi" else _find_openmpi()
    python, path = launch.python or sys.executable, os.environ.get("PATH", "")
    return Tools(python, mpirun, flavour, require_port(free_port_from(launch.port), launch.port), "", openmpi, path)


def _mpi_flavour(mpirun: str) -> MpiFlavour:
    """Return which MPI an mpirun belongs to."""
    if not mpirun:
        return "mpich"
    answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
    return "openmpi" if "Open MPI" in answer else "mpich"


def _find_openmpi() -> str:
    """Return the path of an Open MPI mpirun that is not the first on PATH, empty if there is none."""
    known = shutil.which("ompi_info")
    beside = str(Path(known).with_name("mpirun")) if known else ""
    return beside if beside and _mpi_flavour(beside) == "openmpi" else ""


def make_plan(command: str, config: Config, options: LaunchOptions, tools: Tools, launch_id: str) -> LaunchPlan:
    """Return the plan of a command: which launcher starts how many ranks where.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, or fewer slots than ranks.
    """
    launcher = choose_launcher(command, options)
    hosts = _hosts(config, options, launcher)
    config_path = (config.run_dir / "config.yaml").resolve()
    program = RankProgram(f"launch.ranks.{command}", config_path, launch_id, is_leased=command in LEASED)
    env = rank_environment(config, environment())
    is_train = command in DEEPSPEED
    if launcher == "srun":
        return srun_deepspeed_plan(program, tools, env, hosts) if is_train else srun_plan(program, tools, env, hosts)
    if launcher == "local" and num_slots(hosts) == 1 and not hosts[0].devices:
        return single_plan(program, tools, env)
    if is_train:
        return deepspeed_plan(program, tools, env, hosts, launcher)
    if not tools.mpirun and options.launcher == "auto" and launcher == "local":
        return single_plan(program, tools, env, note=NO_MPI_NOTE)
    return mpirun_plan(program, tools, env, hosts, is_remote=launcher == "mpirun" and options.hostfile is not None)


def choose_launcher(command: str, options: LaunchOptions) -> str:
    """Return the launcher to use; ``auto`` takes this machine without a hostfile, pdsh or mpirun with one.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, or options that contradict each other.
    """
    if options.launcher not in LAUNCHERS:
        raise ConfigError("Unknown launcher.", where=options.launcher, expected=", ".join(LAUNCHERS))
    is_train, has_hosts = command in DEEPSPEED, options.hostfile is not None
    if (options.launcher == "mpirun" and is_train) or (options.launcher.startswith("deepspeed-") and not is_train):
        raise ConfigError(f"`{options.launcher}` does not start `nd {command}`.", todo="leave --launcher out")
    if options.launcher in ("local", "srun") and has_hosts:
        raise ConfigError(
            f"The launcher `{options.launcher}` takes no hostfile.", todo="leave --hostfile or --launcher out"
        )
    if options.launcher.startswith("deepspeed-") and not has_hosts:
        raise ConfigError(f"The launcher `{options.launcher}` needs hosts.", todo="give --hostfile")
    if (options.include or options.exclude) and not has_hosts and options.launcher != "srun":
        raise ConfigError("--include and --exclude choose among the hosts of a hostfile.", todo="give --hostfile")
    if options.launcher != "auto":
        return options.launcher
    if not has_hosts:
        return "local"
    return "deepspeed-pdsh" if is_train else "mpirun"


def _hosts(config: Config, options: LaunchOptions, launcher: str) -> tuple[Host, ...]:
    """Return the hosts and slots to use: --ranks, then launch.ranks, then every slot or GPU."""
    ranks = options.ranks or config.launch.ranks
    if launcher == "srun":
        hosts = allocated_hosts(os.environ, config.slurm.ranks_per_node)
    elif options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
    else:
        return (Host("localhost", ranks or max(1, num_local_gpus())),)
    hosts = filter_hosts(hosts, options.include, options.exclude)
    return limit_slots(hosts, ranks) if ranks else hosts


def rank_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every rank is given, on every host, in addition to its host's own."""
    threads, interface = str(config.launch.threads_per_rank), config.launch.interface
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {
        **carried_environment(environ),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": environ.get("PYTHONPATH", ""),
        **chosen,
    }


def new_launch_id(command: str) -> str:
    """Return a name for a launch that no other launch of this run has."""
    return f"{command}-{time.time_ns()}-{os.getpid()}"


def launch_command(
    command: str,
    config: Config,
    options: LaunchOptions,
    console: Console | None = None,
    check: Callable[[str, Config, int], None] = preflight,
) -> None:
    """Check, write the config, start the ranks of a command and follow them to the end.

    Raises:
        NdDistError: see ``run_plan``, ``preflight`` and ``HostAgents``.
    """
    console = console or Console()
    launch_id, tools = new_launch_id(command), find_tools(config.launch)
    plan = make_plan(command, config, options, tools, launch_id)
    check(command, config, plan.ranks)
    require_starters(plan, Path.home())
    write_config(config)
    if command == "pack" and not pack_recipe_path(config.shards_folder).is_file():
        write_pack_recipe(config)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        agents = _agents_of(command, config, plan, launch_id)
        if agents is not None:
            stack.enter_context(agents)
            facts = agents.facts()
            require_hosts(facts)
            port = require_port(facts[0].port, config.launch.port, plan.hosts[0].name)
            tools = replace(tools, address=facts[0].address, port=port)
            plan = make_plan(command, config, options, tools, launch_id)
        if plan.note:
            console.print(f"  note: {plan.note}", highlight=False)
        wanted = config.launch
        launch = Launch(command, config.run_dir, launch_id, plan, wanted.stop_grace_s, wanted.silence_s)
        lost = run_plan(launch, Watcher(console), environment(), agents)
    if command == "pack":  # one that was refused leaves the recipe that the shards were packed by
        write_pack_recipe(config)
    if lost:
        console.print(f"  note: ranks {lost} were lost on the way; the others did their work", highlight=False)
    seconds = time.monotonic() - started
    console.print(f"  {command}: done by {plan.ranks} rank(s) in {seconds:.1f} s -> {result_of(command, config)}")


def _agents_of(command: str, config: Config, plan: LaunchPlan, launch_id: str) -> HostAgents | None:
    """Return agents for the hosts of a plan that ssh reaches; under Slurm and on this machine none are needed."""
    if not plan.hosts or plan.argv[0] == "srun":
        return None
    wanted = config.launch
    shared_dir = state_dir(config.run_dir).resolve()
    inquiry = Inquiry(launch_id, shared_dir, wanted.interface, wanted.port, wanted.python or sys.executable)
    logs = config.run_dir / "logs" / command
    return HostAgents(plan.hosts, inquiry, logs, environment(), always_ssh="pdsh" in plan.argv)


def environment() -> Mapping[str, str]:
    """Return the environment for child processes: the caller's, with this package importable from anywhere."""
    root = str(Path(__file__).resolve().parents[2])
    others = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([root, *others]))}


def result_of(command: str, config: Config) -> Path | str:
    """Return the path that a command leaves for the user to look at."""
    if command == "pack":
        return f"{config.shards_dir}/index.json"
    if command == "estimate":
        return events_path(config.run_dir, 0)
    return config.run_dir / ("checkpoints" if command in DEEPSPEED else "metrics.json")


def dry_run_command(command: str, config: Config, options: LaunchOptions) -> None:
    """Print what a command would run: configuration, hosts and the exact command line; start nothing."""
    console = Console(soft_wrap=True)
    plan = make_plan(command, config, options, find_tools(config.launch), f"{command}-LAUNCH_ID")
    console.print(f"# {config.run_dir / 'config.yaml'}", highlight=False)
    console.print(config_yaml(config), highlight=False, markup=False)
    hosts = ", ".join(host.describe() for host in _hosts(config, options, choose_launcher(command, options)))
    console.print(f"# hosts: {hosts}", highlight=False)
    for path, text in plan.files.items():
        console.print(f"# file {path}:\n{text}", end="", highlight=False, markup=False)
    if plan.note:
        console.print(f"# note: {plan.note}", highlight=False)
    console.print(plan.shell(), highlight=False, markup=False)
    if command == "pack":
        from launch.commands.packed_shards import describe_pack

        for line in describe_pack(config, plan.ranks):
            console.print(f"# {line}", highlight=False, markup=False)


def make_phantom(recipe: str, overrides: Sequence[str]) -> None:
    """Write the phantom NSD of a recipe and say what is in it."""
    from shards.phantom.write import write_phantom

    config = load_recipe(recipe, overrides)
    summary = write_phantom(config.nsd_root, config.phantom, config.seed)
    Console(soft_wrap=True).print(f"  phantom: {summary.describe()} -> {config.nsd_root}", highlight=False)


def run_report(run_dir: Path, trackers: Sequence[str] = (), figures_dir: Path | None = None) -> None:
    """Write the report of a run and print where it is; log its numbers where trackers are named.

    Args:
        run_dir: Folder of an evaluated run.
        trackers: ``tensorboard`` or ``wandb``.
        figures_dir: Where pictures and table of the run go as files of their own; none: nowhere.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    from nd_dist.report.figures import write_figures
    from nd_dist.report.report import write_report
    from nd_dist.report.tracking import TRACKERS, log_run

    if unknown := sorted(set(trackers) - set(TRACKERS)):
        raise ConfigError("Unknown tracker.", where=", ".join(unknown), expected=" or ".join(TRACKERS))
    console = Console(soft_wrap=True)
    console.print(f"  report: {write_report(run_dir)}", highlight=False)
    if figures_dir is not None:
        for path in write_figures(run_dir, figures_dir):
            console.print(f"  figure: {path}", highlight=False)
    for tracker in trackers:
        console.print(f"  {tracker}: {log_run(run_dir, tracker)}", highlight=False)


def run_conformance_table(directory: Path) -> int:
    """Run every reference case of a folder, print the table; return 0 only if all hold."""
    from launch.commands.tables import conformance_table
    from nd_dist.conformance import run_conformance

    rows = run_conformance(directory)
    # in a file or a pipe every row is one line, however long its note is
    width = None if Console().is_terminal else 200 + max(len(row.note) for row in rows)
    Console(soft_wrap=False, width=width).print(conformance_table(rows))
    return 0 if all(row.ok for row in rows) else 1


def run_merge(out_dir: Path, run_dirs: Sequence[Path]) -> None:
    """Join evaluated runs into one run folder and write its report."""
    from nd_dist.evaluation.merge import merge_runs

    console = Console(soft_wrap=True)
    console.print(f"  merge: {merge_runs(out_dir, run_dirs)} point(s) -> {out_dir / 'metrics.json'}", highlight=False)
    run_report(out_dir)
