"""Plans under Slurm: ``srun`` inside an allocation, and the text of an sbatch script around it.

srun starts every rank itself, of training as well: Slurm is the transport and ends everything, no ssh is needed, and a
rank keeps the GPUs that Slurm gave its task. The ranks meet at the first host and need no MPI: which of Slurm's MPI
plugins works with which library differs by site.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plans.hosts import Host, num_slots
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram, require_names
from launch.plans.tools import Tools
from nd_dist.config import SlurmConfig
from nd_dist.errors import ConfigError

REQUEUE_CODE, FAILURE_CODE = 5, 4
NODES_ANSWER_WITHIN_S = 60


def srun_plan(program: RankProgram, tools: Tools, env: Mapping[str, str], hosts: tuple[Host, ...]) -> LaunchPlan:
    """Return the plan of one rank per slot under srun."""
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
    options = ("--mpi=none", f"--kill-on-bad-exit={kill}", "--cpu-bind=none", "--overlap")
    argv = ("srun", *where, *layout, *options, tools.python, "-m", RANK_MODULE, *program.arguments)
    meeting = {"MASTER_ADDR": tools.address or hosts[0].name, "MASTER_PORT": str(tools.port)}
    leased = program.is_leased
    return LaunchPlan(argv, {**env, **meeting}, ranks, is_leased=leased, hosts=hosts, own_env=own_env, files=files)


@dataclass(frozen=True)
class Submission:
    """One command to submit.

    Args:
        command: ``pack``, ``train``, ``evaluate`` or ``sweep``.
        config_path: The written recipe.
        python: Interpreter on the nodes.
        root: Folder that holds the packages, for PYTHONPATH.
        log_path: Where the job's own output goes (``%j`` and the like are Slurm's).
        points: Guidance points (kappa, eta), one array task each; empty for one job.
    """

    command: str
    config_path: Path
    python: str
    root: Path
    log_path: Path
    points: tuple[tuple[float, float], ...] = ()


def sbatch_text(submission: Submission, slurm: SlurmConfig) -> str:
    """Return the sbatch script of a command: the resources, the site's set-up lines, `nd` as the head of the launch.

    The script asks for a signal before the time ends; `nd` then lets the ranks save and leaves with exit code 5, upon
    which the job puts itself back into the queue. It does so too when ranks were lost and a node does not answer any
    more: `nd` notices a lost node long before Slurm does, which would otherwise see a job that has failed.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(submission, slurm))]
    lines += slurm.setup
    lines.append(f"export PYTHONPATH={shlex.quote(str(submission.root))}${{PYTHONPATH:+:$PYTHONPATH}}")
    words = [submission.python, "-m", "launch.cli", submission.command, str(submission.config_path)]
    command = shlex.join([*words, "--launcher", "srun"])
    if submission.points:
        lines += _array_lines(submission)
        command += ' "run_dir=$part" "sweep.kappa=[$kappa]" "sweep.eta=[$eta]"'
    return "\n".join([*lines, *_run_lines(command, slurm)]) + "\n"


def _options(submission: Submission, slurm: SlurmConfig) -> list[str]:
    """Return the words after ``#SBATCH``."""
    options = [
        f"--job-name=nd-{submission.command}",
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={slurm.ranks_per_node}",
        f"--time={slurm.time_min}",
        f"--signal=B:TERM@{slurm.signal_s}",
        "--open-mode=append",
        f"--output={_quoted(str(submission.log_path))}",
        "--requeue" if slurm.requeue else "--no-requeue",
    ]
    if slurm.gpus_per_node:
        options.append(f"--gpus-per-node={slurm.gpus_per_node}")
    if slurm.cpus_per_rank > 1:
        options.append(f"--cpus-per-task={slurm.cpus_per_rank}")
    if slurm.partition:
        options.append(f"--partition={slurm.partition}")
    if slurm.account:
        options.append(f"--account={slurm.account}")
    if submission.points:
        options.append(f"--array=0-{len(submission.points) - 1}")
    return [*options, *slurm.options]


def _quoted(text: str) -> str:
    """Return a text as sbatch reads one value of a ``#SBATCH`` line.

    Raises:
        ConfigError: it holds a character that sbatch cannot be given there.
    """
    if set(text) & set("\"\\\n'"):
        raise ConfigError("sbatch cannot be given such a path.", found=text, todo="choose another run_dir=")
    return f'"{text}"' if " " in text or "#" in text else text


def _array_lines(submission: Submission) -> list[str]:
    """Return the lines that choose an array task's point and give it a run folder with the trained decoder."""
    kappas = " ".join(f"{kappa:.17g}" for kappa, _ in submission.points)
    etas = " ".join(f"{eta:.17g}" for _, eta in submission.points)
    run_dir = submission.config_path.parent
    return [
        f"kappas=({kappas}) etas=({etas})",
        "kappa=${kappas[$SLURM_ARRAY_TASK_ID]} eta=${etas[$SLURM_ARRAY_TASK_ID]}",
        f"part={shlex.quote(str(run_dir / 'sweep'))}/kappa-$kappa-eta-$eta",
        'mkdir -p "$part"',
        f'ln -sfn {shlex.quote(str(run_dir / "checkpoints"))} "$part/checkpoints"',
    ]


def _run_lines(command: str, slurm: SlurmConfig) -> Sequence[str]:
    """Return the lines that run `nd`, hand it the scheduler's signal, and requeue where it asks for that."""
    lines = [
        f"{command} &",
        "nd=$! warned=no",
        "trap 'warned=yes; kill -TERM $nd' TERM USR1",
        "while :; do",
        "  wait $nd; code=$?",
        "  kill -0 $nd 2>/dev/null || break",
        "done",
    ]
    if slurm.requeue:  # a job that was cancelled is running no more, and stays cancelled; so does one after `nd stop`
        where = f"--nodes={slurm.nodes} --ntasks={slurm.nodes} --ntasks-per-node=1"
        asked = f"timeout {NODES_ANSWER_WITHIN_S} srun {where} --mpi=none --cpu-bind=none --overlap true"
        lines += [
            "again=no",
            f'[ $code = {REQUEUE_CODE} ] && again="$warned"',
            f'[ $code = {FAILURE_CODE} ] && ! {asked} && echo "a node of this job does not answer" && again=yes',
            '[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || again=no',
            '[ $again = yes ] && scontrol requeue "$SLURM_JOB_ID"',
        ]
    return [*lines, "exit $code"]
