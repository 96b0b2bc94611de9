"""A study as jobs of a small Slurm: one is cancelled, a node is lost, and the next command completes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nd_dist.events import read_events
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import run_nd, wait_until_clear
from tests.cluster.slurm import (
    query,
    reason_against_slurm,
    wait_for_state,
)
from tests.launch.study.tiny import write_study
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(bool(reason_against_slurm()), reason=reason_against_slurm())
# a job takes a whole node, so that two trainings run on two
WORDS = ["slurm.cpus_per_rank=4", "slurm.time=20:00", "slurm.sbatch.mem=1G"]
LONG = {"training.steps": [4, 300], "training.checkpoint_every": 50}
STUDY = {
    "sources": {"phantom": {"recipe": "demo", "phantom_data": True, "subjects": [1, 2]}},
    "decoders": {
        "network": {"settings": LONG},
        "ridge": {"settings": {"decoder.kind": "ridge", "training.stages": [2]}},
    },
    "runs": {"guided": {}, "ridge": {"decoder": "ridge"}},
    "tables": [{"title": "Two", "rows": {"network": "guided", "ridge": "ridge"}, "against": "network"}],
}


def submit(slurm: Cluster, path: str) -> dict[str, str]:
    """Submit a study; return name of a job -> its number."""
    said = run_nd(slurm, "node1", "study", "run", path, "--submit", *WORDS)
    return {name: number for number, name in re.findall(r"submitted job (\d+) \(([\w-]+)\)", said)}


def test_a_study_whose_job_is_cancelled_and_whose_node_is_lost_is_completed_by_the_next_command(
    slurm: Cluster,
) -> None:
    folder = slurm.folder / "study-of-two"
    folder.mkdir()
    path = write_study(folder, **STUDY)
    first = submit(slurm, path)
    train, cancelled = first["train-phantom-network-seed-0"], f"{first['evaluate-phantom-ridge-seed-0']}_0"
    query(slurm, ["scancel", cancelled])
    runs = folder / "study" / "phantom" / "network" / "seed-0"
    wait_until(lambda: "node2" in hosts_of(runs), "a training on node2")
    lost = next(run.name for run in runs.iterdir() if "node2" in hosts_of(run))
    task = f"{train}_{int(lost[-1]) - 1}"
    slurm.crash("node2")
    wait_for_state(slurm, task, "PENDING", "NODE_FAIL")  # Slurm notices, and queues the job again
    slurm.boot("node2")
    query(slurm, ["scontrol", "update", f"JobId={task}", "StartTime=now"])  # else it is held back for two minutes
    wait_until(lambda: not query(slurm, ["squeue", "-h"]).strip(), "an empty queue")
    second = submit(slurm, path)
    of_lost_node = {"train-phantom-network-seed-0", "evaluate-phantom-network-seed-0"}  # where Slurm gave it up
    assert set(second) - of_lost_node == {"evaluate-phantom-ridge-seed-0", "report"}, "what is done stays done"
    wait_for_state(slurm, second["report"], "COMPLETED", "FAILED", "CANCELLED")
    said = run_nd(slurm, "node1", "study", "status", path, *WORDS)
    assert said.count("done") == 5 * 2, said
    lines = (folder / "study" / "tables.csv").read_text()
    assert "not run" not in lines
    wait_until_clear(slurm)


def hosts_of(folder: Path) -> set[str]:
    """Return the hosts on which ranks of the runs below a folder have worked."""
    events = (event for log in folder.rglob("events/rank-*.jsonl") for event in read_events(log))
    return {event["host"] for event in events if event["event"] == "rank_start"}
