"""The hosts that a batch system has given to this process: Slurm's allocation, the host lists of PBS, LSF and SGE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from launch.plans.hostfile import expand_nodelist, parse_hostfile, read_hostfile
from launch.plans.hosts import Host
from nd_dist.errors import ConfigError

_SPECIAL_STEPS = 0xFFFFFFF0  # and above: not of an `srun`, but the batch script or the shell of `salloc`


def is_slurm_head(environ: Mapping[str, str]) -> bool:
    """Return whether this process may start steps: it runs in a Slurm allocation, and in no step of an `srun`."""
    if "SLURM_JOB_ID" not in environ or "SLURM_JOB_NODELIST" not in environ:
        return False
    step = environ.get("SLURM_STEP_ID", "")
    return not step.isdecimal() or int(step) >= _SPECIAL_STEPS


def slurm_hosts(environ: Mapping[str, str], ranks_per_node: int) -> tuple[Host, ...]:
    """Return the hosts of the Slurm allocation that this process runs in.

    Slots are the tasks that were asked for; where none were, the GPUs of a node; else the tasks that Slurm assumes.

    Args:
        environ: The process's environment.
        ranks_per_node: Ranks on a node, where the allocation does not say.

    Raises:
        ConfigError: this process runs in no allocation, or the allocation is described in an unknown form.
    """
    nodes = expand_nodelist(environ.get("SLURM_JOB_NODELIST", "")) if "SLURM_JOB_NODELIST" in environ else ()
    if not nodes:
        raise ConfigError(
            "The launcher `srun` works inside a Slurm allocation.",
            todo="use `nd submit`, or run the command under sbatch or salloc",
        )
    tasks, each = _counts(environ.get("SLURM_TASKS_PER_NODE", "")), environ.get("SLURM_NTASKS_PER_NODE", "")
    if len(tasks) != len(nodes):  # those of a step
        tasks = [int(each)] * len(nodes) if each.isdecimal() else []
    gpus = slurm_gpus(environ)
    if gpus and not (each or "SLURM_NTASKS" in environ):
        tasks = [gpus] * len(nodes)
    return tuple(map(Host, nodes, tasks or [ranks_per_node] * len(nodes)))


def slurm_gpus(environ: Mapping[str, str]) -> int:
    """Return the GPUs of a node of the allocation; 0 where it does not say."""
    found = re.search(r"(\d+)$", environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE", ""))
    return int(found[1]) if found else 0


def unused_nodes(environ: Mapping[str, str]) -> str:
    """Return a note for what runs on this machine alone, in an allocation of more nodes; empty elsewhere."""
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1"))
    return f"1 of this allocation's {nodes} nodes is used (`nd submit` uses all)" if nodes > 1 else ""


def _counts(text: str) -> list[int]:
    """Return the numbers of ``2(x3),1``: 2, 2, 2, 1.

    Raises:
        ConfigError: the text is of another form.
    """
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(
                "Slurm's count of tasks is of an unknown form.", where="SLURM_TASKS_PER_NODE", found=text
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def batch_hosts(environ: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the hosts that PBS, LSF or SGE lists for the job of this process; empty where it runs in none.

    Raises:
        ConfigError: a list cannot be read.
    """
    for name in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE"):
        if path := environ.get(name):
            return read_hostfile(Path(path))
    pairs, names = environ.get("LSB_MCPU_HOSTS", "").split(), environ.get("LSB_HOSTS", "").split()
    lines = map("{} {}".format, pairs[::2], pairs[1::2]) if pairs else names
    return parse_hostfile("\n".join(lines), "LSB_HOSTS") if pairs or names else ()
