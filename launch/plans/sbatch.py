"""The text of an sbatch script: resources, the site's set-up lines, `nd` as the head of the launch. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nd_dist.config import SlurmConfig
from nd_dist.errors import ConfigError

SUBMITTED = ("pack", "train", "evaluate", "sweep")
REQUEUE_CODE, FAILURE_CODE = 5, 4
NODES_ANSWER_WITHIN_S = 60
MEMORY = {"mem", "mem-per-cpu", "mem-per-gpu", "exclusive"}


@dataclass(frozen=True)
class Submission:
    """One job to submit.

    Args:
        name: Names the job, its script and its logs: ``train``, ``train-stage2``.
        command: ``pack``, ``train``, ``evaluate``, ``sweep``, or ``study run``.
        config_path: The written recipe, or study.
        python: Interpreter on the nodes.
        root: Folder that holds the packages, for PYTHONPATH.
        slurm: What is asked for.
        words: Further words of the command.
        tasks: Further words of each task of an array; empty for one job.
        chosen: Numbers of the tasks that are submitted; empty: all.
        after: What it waits for: the whole job before it, the task of the same number in it, or nothing.
    """

    name: str
    command: str
    config_path: Path
    python: str
    root: Path
    slurm: SlurmConfig
    words: tuple[str, ...] = ("--launcher", "srun")
    tasks: tuple[tuple[str, ...], ...] = ()
    chosen: tuple[int, ...] = ()
    after: Literal["", "afterok", "aftercorr"] = ""

    @property
    def script_path(self) -> Path:
        """Takes the script; what the job prints goes beside it."""
        return self.config_path.parent / "slurm" / f"{self.name}.sbatch"


def sbatch_text(submission: Submission) -> str:
    """Return the sbatch script of a command.

    The script asks for a signal before the time ends; `nd` then lets the ranks save and leaves with exit code 5, upon
    which the job puts itself back into the queue. It does so too when ranks were lost and a node does not answer any
    more: `nd` notices a lost node long before Slurm does, which would otherwise see a job that has failed.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(submission))]
    lines += submission.slurm.setup
    lines.append(f"export PYTHONPATH={shlex.quote(str(submission.root))}${{PYTHONPATH:+:$PYTHONPATH}}")
    head = [submission.python, "-m", "launch.cli", *submission.command.split()]
    command = shlex.join([*head, str(submission.config_path), *submission.words])
    if submission.tasks:
        cases = (f"  {number}) set -- {shlex.join(words)} ;;" for number, words in enumerate(submission.tasks))
        lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
        command += ' "$@"'
    return "\n".join([*lines, *_run_lines(command, submission.slurm)]) + "\n"


def unasked_memory(slurm: SlurmConfig) -> str:
    """Return a warning where a job asks for no memory, else an empty text."""
    if MEMORY & set(slurm.sbatch):
        return ""
    return "no memory is asked for, and a site's default is often a few GB for each core: slurm.sbatch.mem=200G"


def _options(submission: Submission) -> list[str]:
    """Return the words after ``#SBATCH``."""
    slurm = submission.slurm
    number = "%A-%a" if submission.tasks else "%j"
    log = submission.script_path.with_name(f"{submission.name}-{number}.out")
    options = [
        f"--job-name=nd-{submission.name}",
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={slurm.ranks_per_node}",
        f"--time={slurm.time}",
        f"--signal=B:TERM@{slurm.signal_s}",
        "--open-mode=append",
        f"--output={_quoted(str(log))}",
        "--requeue" if slurm.requeue else "--no-requeue",
    ]
    if slurm.gpus_per_node not in ("", "0"):
        options.append(f"--gpus-per-node={slurm.gpus_per_node}")
    if slurm.cpus_per_rank > 1:
        options.append(f"--cpus-per-task={slurm.cpus_per_rank}")
    if submission.tasks:
        chosen = ",".join(map(str, submission.chosen)) or f"0-{len(submission.tasks) - 1}"
        options.append(f"--array={chosen}")
    own = ((name if name.startswith("-") else f"--{name}", value) for name, value in slurm.sbatch.items())
    return [*options, *(f"{name}={value}" if value else name for name, value in own)]


def _quoted(text: str) -> str:
    """Return a text as sbatch reads one value of a ``#SBATCH`` line.

    Raises:
        ConfigError: it holds a character that sbatch cannot be given there.
    """
    if set(text) & set("\"\\\n'"):
        raise ConfigError("sbatch cannot be given such a path.", found=text, todo="choose another run_dir=")
    return f'"{text}"' if " " in text or "#" in text else text


def _run_lines(command: str, slurm: SlurmConfig) -> Sequence[str]:
    """Return the lines that run `nd`, hand it the scheduler's signal, and requeue where it asks for that."""
    lines = [
        "warned=no",
        "trap 'warned=yes; kill -TERM $!' TERM USR1",
        f"{command} &",
        "while :; do",
        "  wait $!; code=$?",
        "  kill -0 $! 2>/dev/null || break",
        "done",
    ]
    if slurm.requeue:  # a job that was cancelled is running no more, and stays cancelled; so does one after `nd stop`
        where = [f"--nodes={slurm.nodes}", f"--ntasks={slurm.nodes}", "--ntasks-per-node=1"]
        probe = ["srun", *where, "--mpi=none", "--cpu-bind=none", "--overlap", *slurm.srun_options, "true"]
        asked = f"timeout {NODES_ANSWER_WITHIN_S} {shlex.join(probe)}"
        lines += [
            "again=no",
            f'[ $code = {REQUEUE_CODE} ] && again="$warned"',
            f'[ $code = {FAILURE_CODE} ] && ! {asked} && echo "a node of this job does not answer" && again=yes',
            '[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || again=no',
            '[ $again = yes ] && scontrol requeue "$SLURM_JOB_ID"',
        ]
    return [*lines, "exit $code"]
