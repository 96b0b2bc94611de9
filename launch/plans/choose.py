"""Chooses the launcher and the hosts of a command, and returns the plan."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.plans.allocation import batch_hosts, is_slurm_head, slurm_gpus, slurm_hosts, unused_nodes
from launch.plans.deepspeed import deepspeed_plan, local_deepspeed_plan
from launch.plans.environment import environment, rank_environment, stays_behind, visible_devices
from launch.plans.hostfile import read_hostfile
from launch.plans.hosts import Host, filter_hosts, limit_slots, num_local_gpus, num_slots
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import LAUNCHERS, LaunchPlan, RankProgram, single_plan
from launch.plans.slurm import srun_plan
from launch.plans.tools import Tools
from nd_dist.config import Config
from nd_dist.errors import ConfigError, WorldError
from nd_dist.world import World

LEASED = ("evaluate", "sweep", "estimate", "score")
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
        ConfigError: see ``choose``; or the launcher cannot express the hosts.
    """
    chosen = choose(command, config, options, os.environ)
    launcher, hosts, is_train = chosen.launcher, chosen.hosts, command in DEEPSPEED
    config_path = (config.run_dir / "config.yaml").resolve()
    program = RankProgram(f"launch.ranks.{command}", config_path, launch_id, is_leased=command in LEASED)
    env, notes = rank_environment(config, environment()), [chosen.note]
    if launcher == "local":
        env |= visible_devices(hosts[0].devices, os.environ)
    elif launcher != "srun":
        notes.append(stays_behind(os.environ, config.launch))
    if launcher == "srun":
        plan = srun_plan(program, tools, env, hosts, config.slurm, is_train)
    elif launcher == "local" and num_slots(hosts) == 1:
        plan = single_plan(program, tools, env)
    elif launcher == "local" and is_train:
        plan = local_deepspeed_plan(program, tools, env, hosts[0])
    elif launcher == "local" and not tools.mpirun and options.launcher == "auto":
        plan = single_plan(program, tools, env, note=NO_MPI_NOTE)
    elif is_train:
        plan = deepspeed_plan(program, tools, env, hosts, launcher)
    else:
        plan = mpirun_plan(program, tools, env, hosts, is_remote=launcher != "local")
    return replace(plan, note="; ".join(filter(None, [*notes, plan.note])))


def choose(command: str, config: Config, options: LaunchOptions, environ: Mapping[str, str]) -> Choice:
    """Return where a command runs: the hosts of the hostfile, else of the scheduler's allocation, else this machine.

    The ranks are those of --ranks, else of ``launch.ranks``, else every slot or GPU.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, options that contradict each other, or hosts
            that do not fit them.
    """
    require_fitting(command, options)
    launcher, ranks, note = options.launcher, options.ranks or config.launch.ranks, ""
    has_srun = is_slurm_head(environ) and shutil.which("srun", path=environ.get("PATH")) is not None
    if launcher == "srun" or (launcher == "auto" and options.hostfile is None and has_srun):
        launcher, found = "srun", slurm_hosts(environ, config.slurm.ranks_per_node)
    elif not (found := listed_hosts(options, environ, ranks)):
        if launcher.startswith("deepspeed-") or options.include or options.exclude:
            raise ConfigError("There are no hosts to choose from.", todo="give --hostfile")
        note = unused_nodes(environ) if launcher == "auto" else ""
        return Choice("local", (Host("localhost", ranks or max(1, num_local_gpus())),), note)
    hosts = filter_hosts(found, options.include, options.exclude)
    hosts = limit_slots(hosts, ranks) if ranks else hosts
    tasks, gpus = num_slots(found), slurm_gpus(environ) * len(found)
    if launcher == "srun" and num_slots(hosts) < max(tasks, gpus):
        note = f"{num_slots(hosts)} rank(s), where the allocation has {tasks} task(s) and {gpus} GPU(s)"
    if launcher == "auto" and len(hosts) == 1 and (hosts[0].is_local or options.hostfile is None):
        launcher = "local"
    elif launcher == "auto":
        launcher = "deepspeed-pdsh" if command in DEEPSPEED else "mpirun"
    return Choice(launcher, hosts, note)


def require_fitting(command: str, options: LaunchOptions) -> None:
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


def listed_hosts(options: LaunchOptions, environ: Mapping[str, str], ranks: int | None) -> tuple[Host, ...]:
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
