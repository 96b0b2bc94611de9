"""Chooses the launcher and the hosts of a command, and returns the plan."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.plans.allocation import batch_hosts, is_slurm_head, slurm_gpus, slurm_hosts
from launch.plans.deepspeed import deepspeed_plan, local_deepspeed_plan
from launch.plans.environment import environment, rank_environment, stays_behind, visible_devices
from launch.plans.hostfile import read_hostfile
from launch.plans.hosts import Host, filter_hosts, is_loopback, limit_slots, num_local_gpus, num_slots
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import LAUNCHERS, LaunchPlan, RankProgram, single_plan
from launch.plans.slurm import srun_plan
from launch.plans.tools import Tools
from nd_dist.config import Config
from nd_dist.errors import ConfigError, WorldError
from nd_dist.world import World

LEASED = ("evaluate", "sweep", "estimate")
DEEPSPEED = ("train", "phantom_networks")
"""Commands whose ranks DeepSpeed's launcher starts; MPI starts the others'."""
NO_MPI_NOTE = "no MPI runtime was found: one process does the work of all ranks (pip install mpich)"


@dataclass(frozen=True)
class LaunchOptions:
    """The options that every launching command takes (see `nd train --help`)."""

    ranks: int | None = None
    hostfile: Path | None = None
    launcher: str = "auto"
    include: str = ""
    exclude: str = ""


@dataclass(frozen=True)
class Choice:
    """Where the ranks of a command run, and what starts them.

    Args:
        launcher: Any but ``auto``.
        hosts: In rank order; one host for ``local``.
        note: What a user should know about the choice; empty if nothing.
    """

    launcher: str
    hosts: tuple[Host, ...]
    note: str = ""


def make_plan(command: str, config: Config, options: LaunchOptions, tools: Tools, launch_id: str) -> LaunchPlan:
    """Return the plan of a command: which launcher starts how many ranks where.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, or fewer slots than ranks.
    """
    chosen = choose(command, config, options, os.environ)
    plan = _plan(command, config, options, chosen, tools, launch_id)
    notes = [chosen.note, plan.note, stays_behind(os.environ, config.launch) if _uses_ssh(chosen) else ""]
    return replace(plan, note="; ".join(filter(None, notes)))


def _uses_ssh(chosen: Choice) -> bool:
    return chosen.launcher not in ("local", "srun")


def _plan(
    command: str, config: Config, options: LaunchOptions, chosen: Choice, tools: Tools, launch_id: str
) -> LaunchPlan:
    """Return the plan of a choice."""
    config_path = (config.run_dir / "config.yaml").resolve()
    program = RankProgram(f"launch.ranks.{command}", config_path, launch_id, is_leased=command in LEASED)
    env, hosts = rank_environment(config, environment()), chosen.hosts
    if chosen.launcher == "srun":
        return srun_plan(program, tools, env, hosts)
    if chosen.launcher != "local":
        if command in DEEPSPEED:
            return deepspeed_plan(program, tools, env, hosts, chosen.launcher)
        return mpirun_plan(program, tools, env, hosts, is_remote=True)
    env = {**env, **visible_devices(hosts[0].devices, os.environ)}
    if num_slots(hosts) == 1:
        return single_plan(program, tools, env)
    if command in DEEPSPEED:
        return local_deepspeed_plan(program, tools, env, hosts[0])
    if not tools.mpirun and options.launcher == "auto":
        return single_plan(program, tools, env, note=NO_MPI_NOTE)
    return mpirun_plan(program, tools, env, hosts)


def choose(command: str, config: Config, options: LaunchOptions, environ: Mapping[str, str]) -> Choice:
    """Return where a command runs: the hosts of the hostfile, else of the scheduler's allocation, else this machine.

    The ranks are those of --ranks, else of ``launch.ranks``, else every slot or GPU.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, options that contradict each other, or hosts
            that do not fit them.
        WorldError: a name that means another machine on each host.
    """
    _require_fitting(command, options)
    ranks = options.ranks or config.launch.ranks
    if options.launcher == "srun" or (options.launcher == "auto" and options.hostfile is None and _has_srun(environ)):
        found = slurm_hosts(environ, config.slurm.ranks_per_node)
        hosts = _limited(found, options, ranks)
        gpus = slurm_gpus(environ) * len(found)
        is_small = num_slots(hosts) < max(num_slots(found), gpus)
        note = f"{num_slots(hosts)} rank(s), where the allocation has {num_slots(found)} task(s) and {gpus} GPU(s)"
        return Choice("srun", hosts, note if is_small else "")
    found = _listed_hosts(options, environ, ranks)
    if not found:
        if options.include or options.exclude:
            raise ConfigError("--include and --exclude choose among the hosts of a hostfile.", todo="give --hostfile")
        if options.launcher.startswith("deepspeed-"):
            raise ConfigError(f"The launcher `{options.launcher}` needs hosts.", todo="give --hostfile")
        nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
        note = f"this is a step of srun: 1 of {nodes} nodes is used (`nd` works under salloc, sbatch or `nd submit`)"
        host = Host("localhost", ranks or max(1, num_local_gpus()))
        return Choice("local", (host,), note if nodes > 1 and options.launcher == "auto" else "")
    hosts = _limited(found, options, ranks)
    _require_names(hosts)
    if options.launcher != "auto":
        return Choice(options.launcher, hosts)
    if len(hosts) == 1 and (hosts[0].is_local or options.hostfile is None):
        return Choice("local", hosts)
    return Choice("deepspeed-pdsh" if command in DEEPSPEED else "mpirun", hosts)


def _require_fitting(command: str, options: LaunchOptions) -> None:
    """Refuse options that contradict each other, and launchers that do not start a command.

    Raises:
        ConfigError: names them.
    """
    launcher, is_train = options.launcher, command in DEEPSPEED
    if launcher not in LAUNCHERS:
        raise ConfigError("Unknown launcher.", where=launcher, expected=", ".join(LAUNCHERS))
    if (launcher == "mpirun" and is_train) or (launcher.startswith("deepspeed-") and not is_train):
        raise ConfigError(f"`{launcher}` does not start `nd {command}`.", todo="leave --launcher out")
    if launcher in ("local", "srun") and options.hostfile is not None:
        raise ConfigError(f"The launcher `{launcher}` takes no hostfile.", todo="leave --hostfile or --launcher out")


def _has_srun(environ: Mapping[str, str]) -> bool:
    return is_slurm_head(environ) and shutil.which("srun", path=environ.get("PATH")) is not None


def _listed_hosts(options: LaunchOptions, environ: Mapping[str, str], ranks: int | None) -> tuple[Host, ...]:
    """Return the hosts of the hostfile, else those that a batch system lists; none where this machine is meant.

    A batch system counts cores, so a host takes no more ranks than this machine has GPUs, where it has any.
    """
    if options.hostfile is not None:
        return read_hostfile(options.hostfile)
    hosts = batch_hosts(environ) if options.launcher != "local" else ()
    if num_slots(hosts) < 2:  # one core of this machine says nothing about its GPUs
        return ()
    gpus = 0 if ranks else num_local_gpus()
    return tuple(replace(host, slots=min(host.slots, gpus or host.slots)) for host in hosts)


def _limited(hosts: tuple[Host, ...], options: LaunchOptions, ranks: int | None) -> tuple[Host, ...]:
    """Return the hosts and slots that the options leave."""
    left = filter_hosts(hosts, options.include, options.exclude)
    return limit_slots(left, ranks) if ranks else left


def _require_names(hosts: tuple[Host, ...]) -> None:
    """Refuse several hosts of which one is ``localhost``, and several names of this machine.

    Raises:
        WorldError: names them.
    """
    own = [host.name for host in hosts if host.is_local]
    if len(hosts) > 1 and (odd := [name for name in own if is_loopback(name)]):
        todo = f"write the name by which the other hosts know it, such as {socket.gethostname()}"
        raise WorldError("Other hosts cannot reach this machine by such a name.", found=", ".join(odd), todo=todo)
    if len(own) > 1:
        raise WorldError("One machine is named more than once.", found=", ".join(own), todo="keep one of the names")


def require_head(command: str, environ: Mapping[str, str]) -> None:
    """Refuse to launch from a process that a launcher has started as one of several ranks.

    Raises:
        WorldError: says what to start instead.
    """
    try:
        world = World.from_env(environ)
        found = f"rank {world.rank} of {world.size} ({world.family})" if world.size > 1 else ""
    except WorldError as error:
        found = str(error)
    if found:
        raise WorldError(
            f"`nd {command}` starts its ranks itself, and here a launcher has started it as one of its ranks.",
            found=found,
            todo=f"let the launcher run `python -m launch.join {command} RECIPE key=value`, or unset its variables",
        )


def new_launch_id(command: str) -> str:
    """Return a name for a launch that no other launch of this run has."""
    return f"{command}-{time.time_ns()}-{os.getpid()}"
