"""Sections about starting ranks: here, over hosts, under Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from nd_dist.config.base import Positive, Section


def _text(value: object) -> object:
    """Return a number as text; YAML makes numbers of ``4``."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class LaunchConfig(Section):
    """How ranks are started."""

    ranks: Positive | None = None
    """Ranks of every stage (none: one per GPU, or one where there is none)."""
    threads_per_rank: Positive = 1
    """OMP_NUM_THREADS of every rank on CPU; part of the numbers, so it does not follow the number of cores."""
    timeout_s: Annotated[int, Field(ge=5)] = 600
    """Longest wait of a collective call, in seconds."""
    silence_s: Annotated[int, Field(ge=5)] = 3600
    """Seconds without progress after which work counts as hung: an evaluation's unit in which no step (a picture, a
    target of a batch) is done for that long goes to another rank, and a launch ends whose ranks all say nothing for
    that long."""
    start_s: Annotated[int, Field(ge=5)] = 600
    """Seconds within which every rank must have started its program; then the launch ends and names those that have
    not."""
    stop_grace_s: Annotated[int, Field(ge=5)] = 45
    """Seconds that ranks get to save after a stop was asked for; then they are killed."""
    interface: str = ""
    """Network interface of the rendezvous and of gloo, NCCL and MPI, e.g. ib0 (empty: each chooses)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to try for the rendezvous on the first host; 0 takes any free one."""
    env: Mapping[VariableName, Text] = Field(default_factory=dict)
    """Variables of every rank on every host, e.g. {NCCL_IB_HCA: mlx5_0}; they are kept with the run."""
    carry: tuple[VariableName, ...] = ()
    """Further variables of the launching shell that the ranks on all hosts are given; their values are not kept."""
    python: str = ""
    """Interpreter of ranks and agents, e.g. a script that runs Python in a container (empty: the one `nd` runs in)."""


class SlurmConfig(Section):
    """What `nd submit` asks Slurm for, and how `srun` starts ranks."""

    nodes: Positive = 1
    """Nodes of a job."""
    ranks_per_node: Positive = 1
    """Ranks on a node (one per GPU)."""
    gpus_per_node: Text = ""
    """GPUs of a node, e.g. 8 or a100:4 (empty or 0 asks for none)."""
    cpus_per_rank: Positive = 1
    """CPU cores of a rank."""
    time: Annotated[Text, Field(pattern=r"^(\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|infinite)$")] = "1-00:00:00"
    """Time limit as Slurm writes it: minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, ..."""
    signal_s: Positive = 120
    """Seconds before the time limit at which the ranks are asked to save."""
    requeue: bool = True
    """Whether a job that ran out of time or was preempted goes back into the queue and continues."""
    sbatch: Mapping[str, Text] = Field(default_factory=dict)
    """Further sbatch options, printed as they are: {partition: gpu, account: brain, qos: high, mem: 200G, constraint:
    a100, exclusive: true}."""
    srun_options: tuple[str, ...] = ()
    """Further words of every srun, e.g. --container-image=/images/nd.sqsh."""
    mpi: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "auto"
    """Plugin of `srun --mpi`: auto and none start ranks that need no MPI library; with pmi2, pmix or another of
    `srun --mpi=list` the ranks of pack, evaluate and sweep meet by MPI."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command, e.g. module load cuda, source /path/venv/bin/activate."""

    @model_validator(mode="before")
    @classmethod
    def _read_older_keys(cls, values: Any) -> Any:  # Any: whatever YAML holds
        """Turn older recipes' time_min, partition, account and options into today's; drop what is switched off."""
        if not isinstance(values, dict):
            return values
        old = {name: values[name] for name in ("time_min", "partition", "account", "options") if name in values}
        given = {name: value for name, value in values.items() if name not in old}
        if "time_min" in old:
            given["time"] = old["time_min"]
        words = (str(word).removeprefix("--").partition("=")[::2] for word in old.get("options") or ())
        named = {name: old.get(name) for name in ("partition", "account")}
        sbatch = {
            **{name: value for name, value in named.items() if value},
            **dict(words),
            **(given.get("sbatch") or {}),
        }
        off = (None, False)
        given["sbatch"] = {k: "" if v is True else v for k, v in sbatch.items() if not any(v is o for o in off)}
        return given
