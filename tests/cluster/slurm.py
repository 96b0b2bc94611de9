"""A small Slurm on the hosts of a test cluster: munged and slurmd on every host, slurmctld on the first."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.support.waiting import wait_until

PROGRAMS = ("/usr/sbin/munged", "/usr/sbin/slurmctld", "/usr/sbin/slurmd", "sbatch", "srun", "squeue", "scontrol")
CPUS = 4
# small time-outs, so that tests of a lost host end soon; no cgroups, because the hosts have no tree of their own
CONF = """\
ClusterName=nodes
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000
ReturnToService=2
SlurmdTimeout=60
KillWait=5
OverTimeLimit=0
UnkillableStepTimeout=10
MessageTimeout=100
TCPTimeout=30
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
BOOT = """\
#!/bin/bash
mkdir -p /run/munge /run/slurmd /etc/slurm && mount --bind {folder} /etc/slurm
/usr/sbin/munged --foreground --force --key-file={folder}/munge.key --socket=/run/munge/munge.socket.2 \\
  --pid-file=/run/munge/munged.pid --log-file=/run/munge/munged.log --seed-file=/run/munge/seed --num-threads=2 &
until [ -S /run/munge/munge.socket.2 ]; do sleep 0.1; done
if [ "$1" = node1 ]; then /usr/sbin/slurmctld -D & fi
exec /usr/sbin/slurmd -D -N "$1"
"""


def reason_against_slurm() -> str:
    """Return why this machine cannot run Slurm, an empty text if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(missing)} (packages slurm-wlm, munge)" if missing else ""


def write_slurm(folder: Path, names: Sequence[str], addresses: Sequence[str]) -> Path:
    """Write configuration, key and boot script; return the boot script."""
    folder.mkdir()
    (folder / "state").mkdir()
    nodes = [
        f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
        for name, address in zip(names, addresses, strict=True)
    ]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, nodes="\n".join(nodes)))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    boot = folder / "boot"
    boot.write_text(BOOT.format(folder=folder))
    boot.chmod(0o755)
    return boot


def wait_for_nodes(cluster: Cluster) -> None:
    """Wait until Slurm has every node idle."""

    def idle() -> bool:
        states = query(cluster, ["sinfo", "-h", "-N", "-o", "%T"]).split()
        return states.count("idle") == cluster.num_hosts

    wait_until(idle, "idle nodes in sinfo", pause_s=0.1)


def query(cluster: Cluster, words: Sequence[str]) -> str:
    """Return what a Slurm command prints, an empty text where it fails; never waits for ever."""
    return cluster.run("node1", ["timeout", "300", *words]).stdout


def job_state(cluster: Cluster, job: str) -> str:
    """Return a job's state."""
    text = query(cluster, ["scontrol", "show", "job", job])
    return next((word.partition("=")[2] for word in text.split() if word.startswith("JobState=")), "")


def wait_for_state(cluster: Cluster, job: str, *states: str) -> str:
    """Wait until a job is in one of some states and return which."""
    wait_until(lambda: job_state(cluster, job) in states, f"job {job} in {states}", pause_s=0.1)
    return job_state(cluster, job)


def run_queued_now(cluster: Cluster, job: str) -> None:
    """Let a requeued job start now: Slurm holds it back for two minutes."""
    wait_for_state(cluster, job, "PENDING")
    query(cluster, ["scontrol", "update", f"JobId={job}", "StartTime=now"])


def sbatch(cluster: Cluster, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a submitting command on the first host."""
    return cluster.run("node1", words)
