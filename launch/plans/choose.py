"""Chooses the launcher and the hosts of a command, and returns the plan."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from launch.plans.deepspeed import deepspeed_plan
from launch.plans.environment import environment, rank_environment
from launch.plans.hosts import Host, filter_hosts, limit_slots, num_local_gpus, num_slots, read_hostfile
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import LAUNCHERS, LaunchPlan, RankProgram, single_plan
from launch.plans.slurm import allocated_hosts, srun_deepspeed_plan, srun_plan
from launch.plans.tools import Tools
from nd_dist.config import Config
from nd_dist.errors import ConfigError

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


def make_plan(command: str, config: Config, options: LaunchOptions, tools: Tools, launch_id: str) -> LaunchPlan:
    """Return the plan of a command: which launcher starts how many ranks where.

    Raises:
        ConfigError: unknown launcher, one that cannot start this command, or fewer slots than ranks.
    """
    launcher = choose_launcher(command, options)
    hosts = chosen_hosts(config, options, launcher)
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


def chosen_hosts(config: Config, options: LaunchOptions, launcher: str) -> tuple[Host, ...]:
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


def new_launch_id(command: str) -> str:
    """Return a name for a launch that no other launch of this run has."""
    return f"{command}-{time.time_ns()}-{os.getpid()}"
