"""Plans of DeepSpeed's launcher: on this machine, over ssh with pdsh, or through Open MPI's or MPICH's mpirun."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from launch.plans.hosts import Host, hostfile_text, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, equal_slots, require_first_devices, require_plain
from launch.plans.tools import Tools
from nd_dist.errors import ConfigError

# a host that answers nothing for half a minute is lost; shorter troubles of the network are sat out
SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
)  # fmt: skip


def deepspeed_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], launcher: str
) -> LaunchPlan:
    """Return the plan of DeepSpeed's launcher.

    Args:
        program: What a rank runs.
        tools: What this machine has.
        env: Variables of every rank.
        hosts: Where the ranks run, in rank order.
        launcher: ``local`` (this machine), ``deepspeed-pdsh``, ``deepspeed-openmpi`` or ``deepspeed-mpich``.

    Raises:
        ConfigError: the launcher cannot express the hosts, or its program is missing.
    """
    runner = (tools.python, "-m", "deepspeed.launcher.runner")
    common = ("--master_port", str(tools.port), "--no_local_rank")
    started = ("--module", RANK_MODULE, *program.arguments)
    ranks = num_slots(hosts)
    if launcher == "local":
        devices = hosts[0].devices
        here = ("--include", _include(hosts)) if devices else ("--num_gpus", str(ranks))
        return LaunchPlan((*runner, *here, *common, *started), env, ranks)
    address = tools.address or hosts[0].name
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(tools.port)}
    ways = {"deepspeed-pdsh": _pdsh, "deepspeed-openmpi": _openmpi, "deepspeed-mpich": _mpich}
    where, own_env = ways[launcher](tools, hosts, {**env, **meeting})
    at = ("--hostfile", str(program.hostfile_path), "--force_multi", "--master_addr", address)
    files = {program.hostfile_path: hostfile_text(_numbered(hosts))}
    if launcher == "deepspeed-mpich":  # its helper cannot start a module
        script = program.hostfile_path.with_name("rank.py")
        files[script] = f"import runpy\n\nrunpy.run_module({RANK_MODULE!r}, run_name='__main__', alter_sys=True)\n"
        started = (str(script), *program.arguments)
    argv = (*runner, *at, *where, *common, *started)
    return LaunchPlan(argv, {**env, **meeting}, ranks, hosts=hosts, own_env=own_env, files=files)


def _numbered(hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """Return the hosts with as many slots as their highest GPU needs (DeepSpeed checks --include against them)."""
    return tuple(Host(host.name, max(host.device_ids) + 1) for host in hosts)


def _include(hosts: tuple[Host, ...]) -> str:
    """Return DeepSpeed's filter for exactly these hosts and GPUs."""
    return "@".join(f"{host.name}:{','.join(map(str, host.device_ids))}" for host in hosts)


def _pdsh(tools: Tools, hosts: tuple[Host, ...], env: Mapping[str, str]) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return the words and variables of the pdsh launcher."""
    require_plain(tools.python, "the path of Python", "pdsh")
    require_plain(env.get("PYTHONPATH", "-"), "PYTHONPATH", "pdsh")
    return ("--launcher", "pdsh", "--include", _include(hosts)), {"PDSH_SSH_ARGS_APPEND": SSH_OPTIONS}


def _openmpi(
    tools: Tools, hosts: tuple[Host, ...], env: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return the words and variables of the Open MPI launcher.

    DeepSpeed passes no rendezvous to Open MPI's ranks (they would wait for ever), and takes the first mpirun on PATH,
    whichever MPI that is.
    """
    if not tools.openmpi:
        raise ConfigError("There is no Open MPI on this machine.", todo="install one: apt-get install openmpi-bin")
    require_first_devices(hosts, "deepspeed-openmpi")
    words = [word for name in ("MASTER_ADDR", "MASTER_PORT") for word in ("-x", f"{name}={env[name]}")]
    interface = env.get("GLOO_SOCKET_IFNAME", "")
    words += ["--mca", "btl_tcp_if_include", interface] if interface else []
    words += ["--mca", "plm_rsh_args", SSH_OPTIONS]
    return ("--launcher", "openmpi", f"--launcher_args={shlex.join(words)}"), _mpi_environment(tools, tools.openmpi)


def _mpich(
    tools: Tools, hosts: tuple[Host, ...], _env: Mapping[str, str]
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return the words and variables of the MPICH launcher."""
    if not tools.mpirun or tools.mpi_flavour != "mpich":
        raise ConfigError("There is no MPICH on this machine.", todo="install one: pip install mpich (extra `mpi`)")
    require_first_devices(hosts, "deepspeed-mpich")
    equal_slots(hosts, "deepspeed-mpich")
    return ("--launcher", "mpich"), _mpi_environment(tools, tools.mpirun)


def _mpi_environment(tools: Tools, mpirun: str) -> dict[str, str]:
    """Return variables that make DeepSpeed find this very mpirun."""
    path = ":".join(part for part in (str(Path(mpirun).parent), tools.path) if part)
    return {"PATH": path, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
