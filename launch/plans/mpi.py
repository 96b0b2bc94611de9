"""Plans of mpirun: MPICH's and Open MPI's, on this machine or over hosts."""

from __future__ import annotations

from collections.abc import Mapping

from launch.plans.hosts import Host, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, require_names
from launch.plans.tools import Tools
from nd_dist.errors import ConfigError


def mpirun_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], is_remote: bool = False
) -> LaunchPlan:
    """Return the plan of mpirun.

    Args:
        program: What a rank runs.
        tools: What this machine has.
        env: Variables of every rank.
        hosts: Where the ranks run, in rank order.
        is_remote: Whether ssh starts the ranks on the hosts; otherwise all of them are this machine's.

    Raises:
        ConfigError: there is no mpirun, or it cannot express the hosts.
    """
    if not tools.mpirun:
        raise ConfigError("There is no mpirun on this machine.", todo="install one: pip install mpich (extra `mpi`)")
    ranks, is_openmpi = num_slots(hosts), tools.mpi_flavour == "openmpi"
    words = [tools.mpirun, "-n", str(ranks)]
    if not is_openmpi:  # hydra would ask a scheduler to start its helpers, even on this machine, and wait for ever
        words += ["-launcher", "ssh" if is_remote else "fork", "-rmk", "user"]
    if program.is_leased:  # the other ranks live on when one dies
        words.append("--enable-recovery" if is_openmpi else "-disable-auto-cleanup")
    if is_openmpi:
        words += ["--allow-run-as-root", "--oversubscribe", "-x", "PYTHONPATH"]
    interface = env.get("GLOO_SOCKET_IFNAME", "")
    if is_remote:
        require_names(hosts, "mpirun", takes_users=not is_openmpi)
        places = ",".join(f"{host.login}:{host.slots}" for host in hosts)
        words += ["--host" if is_openmpi else "-hosts", places]
        if interface:
            words += ["--mca", "btl_tcp_if_include", interface] if is_openmpi else ["-iface", interface]
    argv = (*words, tools.python, "-m", RANK_MODULE, *program.arguments)
    return LaunchPlan(argv, env, ranks, is_leased=program.is_leased, hosts=hosts if is_remote else ())
