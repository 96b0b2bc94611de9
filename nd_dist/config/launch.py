"""Sections about starting ranks: here, over hosts, under Slurm."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nd_dist.config.base import Count, Positive, Section


class LaunchConfig(Section):
    """How ranks are started."""

    ranks: Positive | None = None
    """Ranks of every stage (none: one per GPU, or one where there is none)."""
    threads_per_rank: Positive = 1
    """OMP_NUM_THREADS of every rank on CPU; part of the numbers, so it does not follow the number of cores."""
    timeout_s: Annotated[int, Field(ge=5)] = 600
    """Longest wait of a collective call, in seconds."""
    silence_s: Annotated[int, Field(ge=5)] = 3600
    """Seconds without progress after which work counts as hung: an evaluation's unit in which no picture is done for
    that long goes to another rank, and a launch ends whose ranks all say nothing for that long."""
    start_s: Annotated[int, Field(ge=5)] = 600
    """Seconds within which every rank must have started its program; then the launch ends and names those that have
    not."""
    stop_grace_s: Annotated[int, Field(ge=5)] = 45
    """Seconds that ranks get to save after a stop was asked for; then they are killed."""
    interface: str = ""
    """Network interface of the rendezvous and of gloo, NCCL and MPI, e.g. ib0 (empty: each chooses)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to try for the rendezvous on the first host; 0 takes any free one."""
    python: str = ""
    """Interpreter of ranks and agents, e.g. a script that runs Python in a container (empty: the one `nd` runs in)."""


class SlurmConfig(Section):
    """What `nd submit` asks Slurm for."""

    nodes: Positive = 1
    """Nodes of a job."""
    ranks_per_node: Positive = 1
    """Ranks on a node (one per GPU)."""
    gpus_per_node: Count = 0
    """GPUs of a node; 0 asks for none."""
    cpus_per_rank: Positive = 1
    """CPU cores of a rank."""
    time_min: Positive = 1440
    """Time limit in minutes."""
    signal_s: Positive = 120
    """Seconds before the time limit at which the ranks are asked to save."""
    requeue: bool = True
    """Whether a job that ran out of time or was preempted goes back into the queue and continues."""
    partition: str = ""
    """Partition (empty: the site's default)."""
    account: str = ""
    """Account (empty: the user's default)."""
    options: tuple[str, ...] = ()
    """Further sbatch options, e.g. --constraint=a100."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command, e.g. module load cuda, source /path/venv/bin/activate."""
