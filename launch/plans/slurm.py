"""Plans under Slurm: ``srun`` inside an allocation.

srun starts every rank itself, of training as well: Slurm is the transport and ends everything, no ssh is needed, and a
rank keeps the GPUs that Slurm gave its task. The ranks meet at the first host and need no MPI: which of Slurm's MPI
plugins works with which library differs by site.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.plans.hosts import Host, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, require_names
from launch.plans.tools import Tools
from nd_dist.config import SlurmConfig

# with UCX, MPICH 5.0 publishes what lies in memory behind a rank's address as well, more than Slurm's PMI2 takes
MPICH_OVER_PMI2 = {"MPIR_CVAR_CH4_NETMOD": "ofi"}


def srun_plan(
    program: RankProgram,
    tools: Tools,
    env: Mapping[str, str],
    hosts: tuple[Host, ...],
    slurm: SlurmConfig,
    is_train: bool,
) -> LaunchPlan:
    """Return the plan of one rank per slot under srun; a plugin that the recipe chooses is for all but training."""
    require_names(hosts, "srun")
    ranks, files, own_env = num_slots(hosts), {}, {}
    names = [host.name for host in hosts for _ in range(host.slots)]
    nodes = ",".join(dict.fromkeys(names))
    layout: tuple[str, ...] = ("--nodelist", nodes, "--ntasks-per-node", str(hosts[0].slots), "--distribution=block")
    if len({host.slots for host in hosts}) > 1:
        order = program.config_path.parent / ".state" / "ranks-by-host"
        files, own_env = {order: "".join(f"{name}\n" for name in names)}, {"SLURM_HOSTFILE": str(order)}
        layout = ("--distribution=arbitrary",)
    where = ("--nodes", str(len(hosts)), "--ntasks", str(ranks))
    kill = "0" if program.is_leased else "1"  # leased work goes on without a rank that died
    mpi = "none" if slurm.mpi == "auto" else slurm.mpi
    options = (f"--mpi={mpi}", f"--kill-on-bad-exit={kill}", "--cpu-bind=none", "--overlap", *slurm.srun_options)
    argv = ("srun", *where, *layout, *options, tools.python, "-m", RANK_MODULE, *program.arguments)
    meeting = {"MASTER_ADDR": tools.address or hosts[0].name, "MASTER_PORT": str(tools.port)}
    if mpi != "none" and not is_train:
        meeting = MPICH_OVER_PMI2
    leased = program.is_leased
    return LaunchPlan(argv, {**meeting, **env}, ranks, is_leased=leased, hosts=hosts, own_env=own_env, files=files)
