"""Launch plans: what would run, as a pure value. Nothing here starts a process or reads the environment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from launch.hosts import Host
from nd_dist.errors import ConfigError

Launcher = Literal["auto", "local", "deepspeed-pdsh", "mpirun"]
LAUNCHERS: tuple[str, ...] = get_args(Launcher)
MpiFlavour = Literal["mpich", "openmpi"]


@dataclass(frozen=True)
class LaunchPlan:
    """One command line that starts the ranks of one command.

    Args:
        argv: The command, one word each (never through a shell).
        env: Variables set in addition to the caller's.
        ranks: How many ranks it starts.
        note: What a user should know about it; empty if nothing.
        is_leased: Whether ranks take work from a shared pool, so that one that finishes proves that all work is
            done, and one that dies costs only its unit.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    ranks: int
    note: str = ""
    is_leased: bool = False

    def shell(self) -> str:
        """Return the command as a line for a POSIX shell, every word quoted."""
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " ".join([*words, shlex.join(self.argv)])


@dataclass(frozen=True)
class Tools:
    """What the launching machine has: found once at the edge, passed to the pure planners.

    Args:
        python: The interpreter that the ranks run.
        mpirun: Path of mpirun, empty if there is no MPI.
        mpi_flavour: Which mpirun it is.
        port: A free port for the rendezvous.
    """

    python: str
    mpirun: str = ""
    mpi_flavour: MpiFlavour = "mpich"
    port: int = 29500


@dataclass(frozen=True)
class RankProgram:
    """The module that every rank runs, with the one config file that it is given.

    Args:
        module: ``python -m`` name, e.g. ``launch.train_rank``.
        config_path: The run's config file.
        launch_id: Names this launch in the events, so that its completion records can be told from older ones.
        options: Further words.
        is_leased: See ``LaunchPlan``.
    """

    module: str
    config_path: Path
    launch_id: str
    options: tuple[str, ...] = ()
    is_leased: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments after the module name; positional, because DeepSpeed's parser also tries options that follow."""
        return (str(self.config_path), self.launch_id, *self.options)


def single_plan(program: RankProgram, tools: Tools, env: Mapping[str, str], note: str = "") -> LaunchPlan:
    """Return the plan of one process without any launcher."""
    return LaunchPlan((tools.python, "-m", program.module, *program.arguments), env, 1, note, program.is_leased)


def deepspeed_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], hostfile: Path | None
) -> LaunchPlan:
    """Return the plan of DeepSpeed's launcher: on this machine, or over ssh with pdsh where a hostfile is given."""
    ranks = sum(host.slots for host in hosts)
    runner = (tools.python, "-m", "deepspeed.launcher.runner")
    if hostfile is None:
        where: tuple[str, ...] = ("--num_gpus", str(ranks))
    else:
        include = "@".join(f"{host.name}:{','.join(str(slot) for slot in range(host.slots))}" for host in hosts)
        where = ("--hostfile", str(hostfile), "--include", include, "--launcher", "pdsh", "--force_multi")
    common = ("--master_port", str(tools.port), "--no_local_rank", "--module", program.module)
    return LaunchPlan((*runner, *where, *common, *program.arguments), env, ranks)


def mpirun_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], hostfile: Path | None
) -> LaunchPlan:
    """Return the plan of mpirun (MPICH's or Open MPI's): on this machine, or over the hosts of a hostfile.

    Raises:
        ConfigError: there is no mpirun.
    """
    if not tools.mpirun:
        raise ConfigError("There is no mpirun on this machine.", todo="install one: pip install mpich (extra `mpi`)")
    ranks = sum(host.slots for host in hosts)
    words: list[str] = [tools.mpirun, "-n", str(ranks)]
    if program.is_leased:  # the other ranks live on when one dies
        words.append("--enable-recovery" if tools.mpi_flavour == "openmpi" else "-disable-auto-cleanup")
    if tools.mpi_flavour == "openmpi":
        words += ["--allow-run-as-root", "--oversubscribe"]
        if hostfile is not None:
            words += ["--host", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        words += [part for name in sorted(env) for part in ("-x", name)]
    elif hostfile is not None:
        words += ["-hosts", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
        words += [part for name, value in sorted(env.items()) for part in ("-genv", name, value)]
    argv = (*words, tools.python, "-m", program.module, *program.arguments)
    return LaunchPlan(argv, env, ranks, is_leased=program.is_leased)
