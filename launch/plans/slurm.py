"""Plans under Slurm: ``srun`` inside an allocation.

DeepSpeed's own Slurm launcher is not used: it ignores which hosts were allocated and sets no rendezvous. Here one srun
task per node starts DeepSpeed's per-node launcher, so Slurm is the transport and ends everything; no ssh is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.plans.hosts import Host, expand_nodelist, hostfile_text, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, equal_slots, require_first_devices
from launch.plans.tools import Tools
from nd_dist.config import SlurmConfig
from nd_dist.errors import ConfigError

# the node's number is known on the node only: the one word that a shell there has to fill in
NODE_SCRIPT = 'exec "$@" --node_rank "$SLURM_NODEID" --module'
# with UCX, MPICH 5.0 publishes what lies in memory behind a rank's address as well, more than Slurm's PMI2 takes
MPICH_OVER_PMI2 = {"MPIR_CVAR_CH4_NETMOD": "ofi"}


def allocated_hosts(environ: Mapping[str, str], ranks_per_node: int) -> tuple[Host, ...]:
    """Return the hosts of the Slurm allocation that this process runs in.

    Args:
        environ: The process's environment.
        ranks_per_node: Ranks on a node, where the allocation does not say.

    Raises:
        ConfigError: this process runs in no allocation.
    """
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ConfigError(
            "The launcher `srun` works inside a Slurm allocation.",
            todo="use `nd submit`, or run the command under sbatch or salloc",
        )
    slots = environ.get("SLURM_NTASKS_PER_NODE", "")
    return tuple(Host(name, int(slots or ranks_per_node)) for name in expand_nodelist(nodes))


def srun_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], slurm: SlurmConfig
) -> LaunchPlan:
    """Return the plan of one MPI rank per slot under srun.

    Raises:
        ConfigError: no plugin of this Slurm starts ranks of mpi4py's library.
    """
    require_first_devices(hosts, "srun")
    slots, ranks = equal_slots(hosts, "srun"), num_slots(hosts)
    where = ("--nodes", str(len(hosts)), "--ntasks", str(ranks), "--ntasks-per-node", str(slots))
    kill = "0" if program.is_leased else "1"  # leased work goes on without a rank that died
    mpi = slurm.mpi if slurm.mpi != "auto" else tools.slurm_mpi
    if not mpi:
        raise ConfigError(
            "`srun --mpi=list` names no plugin that starts ranks of mpi4py's MPI library.",
            todo="choose one of the list with slurm.mpi=, or install another library (pip install mpich)",
        )
    options = (f"--mpi={mpi}", f"--kill-on-bad-exit={kill}", "--cpu-bind=none", "--overlap", *slurm.srun_options)
    argv = ("srun", *where, *options, tools.python, "-m", RANK_MODULE, *program.arguments)
    return LaunchPlan(argv, {**MPICH_OVER_PMI2, **env}, ranks, is_leased=program.is_leased, hosts=hosts)


def srun_deepspeed_plan(
    program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...], slurm: SlurmConfig
) -> LaunchPlan:
    """Return the plan of DeepSpeed's per-node launcher, started once on every node by srun."""
    require_first_devices(hosts, "srun")
    equal_slots(hosts, "srun")
    address = tools.address or hosts[0].name
    nodes = str(len(hosts))
    where = ("--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1")
    options = ("--mpi=none", "--kill-on-bad-exit=1", "--cpu-bind=none", "--overlap", *slurm.srun_options)
    runner = (tools.python, "-m", "deepspeed.launcher.runner", "--hostfile", str(program.hostfile_path), "--no_ssh")
    meeting = ("--master_addr", address, "--master_port", str(tools.port), "--no_local_rank")
    words = (RANK_MODULE, *program.arguments)
    script = f"{NODE_SCRIPT} {' '.join(words)}"
    argv = ("srun", *where, *options, "bash", "-c", script, "node", *runner, *meeting)
    files = {program.hostfile_path: hostfile_text(hosts)}
    return LaunchPlan(argv, env, num_slots(hosts), hosts=hosts, files=files)
