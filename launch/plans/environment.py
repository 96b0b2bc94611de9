"""The one place that makes the environments of started processes: what goes in, what goes along, what stays out.

A process that `nd` starts has the caller's environment without the variables of any launcher or scheduler that the
plan does not use: they would steer DeepSpeed, mpirun or the ranks behind its back. A rank, on whatever host, is given
the variables of ``rank_environment`` on top, in a file of the run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from launch.plans.plan import LaunchPlan
from nd_dist.config import Config, LaunchConfig
from nd_dist.errors import ConfigError
from nd_dist.provenance import NUMERIC
from nd_dist.versions import CODE_DIR

# what can move a number or a packet, or where things are looked for: the ranks on other hosts are given these
CARRIED = re.compile(
    NUMERIC.pattern
    + "|(AWS|CUDA_(DEVICE|LAUNCH|MODULE)|DS|FI|GLOO|HF|HUGGINGFACE|MPICH|MPIR_CVAR|NCCL|OMPI_MCA|PYTORCH|TORCHINDUCTOR"
    "|TRANSFORMERS|TRITON|UCX|WANDB|XDG_CACHE)_|(https?|all|no|ftp)_proxy$|(HTTPS?|ALL|NO|FTP)_PROXY$"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")
_LOGIN = re.compile(r"://[^/@]*:[^/@]*@")
DEVICES = "CUDA_VISIBLE_DEVICES"
# what launchers tell the processes that they start, and how users steer mpirun's own start
_LAUNCHERS = re.compile(
    r"(RANK|WORLD_SIZE|(LOCAL|NODE|GROUP|ROLE|CROSS)_(RANK|SIZE|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME|DS_ENV_FILE"
    r"|MPI_LOCALN?RANK(S|ID))$|TORCHELASTIC_|PET_|OMPI_(?!ALLOW_RUN_AS_ROOT|MCA_)|OMPI_MCA_(ess|initial_wdir|orte|plm"
    r"|pmix|prte|ras|routed|shmem_RUNTIME)|PMI[2X]?_(?!MCA_)|PRTE_(?!MCA_)|HYD(RA|I)_|I_MPI_HYDRA_|MV2_COMM_WORLD_|PALS_"
)
_SLURM = re.compile(r"(SLURMD?|SRUN|SALLOC)_")
_SLURM_STEP = re.compile(  # of a step above, or a wish that would change what the plan says
    r"SLURM_(STEP|PROCID|LOCALID|NODEID|TASK_PID|GTIDS|EXPORT_ENV|DISTRIBUTION|NTASKS|NPROCS|HOSTFILE|MPI_TYPE)"
)
_SCHEDULERS = re.compile(r"(PBS|LSB|LSF|SGE|FLUX|COBALT|LOADL)_|PE_HOSTFILE$")


def environment(plan: LaunchPlan | None = None) -> dict[str, str]:
    """Return the environment of processes that are started here, for a plan or for something else."""
    for_srun = plan is not None and plan.argv[0] == "srun"
    kept = {name: value for name, value in os.environ.items() if not is_foreign(name, for_srun)}
    if plan is not None and plan.hosts and not for_srun:
        kept.pop(DEVICES, None)  # of this machine; mpirun would give it to every host
    others = [os.path.abspath(part) for part in kept.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(CODE_DIR), *others]))}


def is_foreign(name: str, for_srun: bool = False) -> bool:
    """Return whether a variable is of a launcher or a scheduler that has no part in a launch, by ``srun`` or not."""
    slurm = (_SLURM_STEP if for_srun else _SLURM).match(name)
    return bool(slurm or _LAUNCHERS.match(name) or _SCHEDULERS.match(name))


def carried_environment(environ: Mapping[str, str], carry: Sequence[str] = ()) -> dict[str, str]:
    """Return the caller's variables that the ranks on every host are given.

    Args:
        environ: The caller's.
        carry: Names that go along in any case; nothing else that looks like a secret does.
    """
    return {
        name: value
        for name, value in sorted(environ.items())
        if name in carry or (_is_known(name) and not _is_secret(name, value))
    }


def _is_known(name: str) -> bool:
    return bool(CARRIED.match(name)) and not is_foreign(name)


def _is_secret(name: str, value: str) -> bool:
    return bool(SECRET.search(name) or _LOGIN.search(value))


def stays_behind(environ: Mapping[str, str], launch: LaunchConfig) -> str:
    """Return a sentence about known variables that the ranks on other hosts are not given; empty if there are none."""
    left = [name for name, value in environ.items() if _is_known(name) and _is_secret(name, value)]
    left += [DEVICES] if DEVICES in environ else []
    absent = sorted(set(launch.carry) - set(environ))
    names = sorted(set(left) - {*launch.carry, *launch.env})
    said = [f"ranks on other hosts do not get {', '.join(names)} (launch.carry=[NAME] would send it)"] if names else []
    said += [f"launch.carry names {', '.join(absent)}, which is not set here"] if absent else []
    return "; ".join(said)


def recipe_environment(launch: LaunchConfig) -> dict[str, str]:
    """Return the variables that a recipe sets for every rank.

    Raises:
        ConfigError: ``launch.env`` sets what a launcher says.
    """
    if wrong := sorted(name for name in launch.env if is_foreign(name)):
        raise ConfigError("A launcher sets these variables itself.", where="launch.env", found=", ".join(wrong))
    threads, interface = str(launch.threads_per_rank), launch.interface
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **chosen,
        **launch.env,
    }


def rank_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every rank is given, on every host, in addition to its host's own."""
    carried = carried_environment(environ, config.launch.carry)
    return {**carried, "PYTHONPATH": environ.get("PYTHONPATH", ""), **recipe_environment(config.launch)}


def visible_devices(devices: Sequence[int], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that gives processes of this machine some of the GPUs that this process may use, by name.

    Args:
        devices: Which of them, counted from 0; empty: all.
        environ: This process's; its GPUs may be numbers, ``GPU-...`` or ``MIG-...``.

    Raises:
        ConfigError: there are not so many.
    """
    seen = environ.get(DEVICES)
    if seen is None or not devices:
        return {DEVICES: seen} if seen is not None else ({DEVICES: ",".join(map(str, devices))} if devices else {})
    names = [name.strip() for name in seen.split(",") if name.strip()]
    if max(devices) >= len(names):
        raise ConfigError("A GPU was chosen that is not visible.", where=f"{DEVICES}={seen}", found=max(devices))
    return {DEVICES: ",".join(names[number] for number in devices)}
