"""A small Slurm (slurmctld, two slurmd): submitted commands, cancellation, the warning before the time limit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from nd_dist.events import events_path, read_events
from nd_dist.models.decoder import Decoder
from tests.cluster.hosts import Cluster
from tests.cluster.jobs import ND, losses, metrics_points, record, record_start, run_nd, wait_until_clear, words_of
from tests.cluster.slurm import (
    job_state,
    query,
    reason_against_slurm,
    run_queued_now,
    sbatch,
    wait_for_nodes,
    wait_for_state,
)
from tests.cluster.test_line import assert_equal_shards, hosts_of
from tests.support.environments import SHELL, WORDS, assert_as_planned, rank_environments
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(bool(reason_against_slurm()), reason=reason_against_slurm())
NODES = ["slurm.nodes=2", "slurm.ranks_per_node=1", "slurm.time=20:00", "slurm.sbatch.mem=1G"]


@pytest.fixture
def folder(slurm: Cluster, packed: Path, tmp_path: Path) -> Path:
    """A folder on Slurm's hosts with the packed shards."""
    own = slurm.folder / tmp_path.name
    own.mkdir()
    for name in ("nsd", "shards"):
        shutil.copytree(packed / name, own / name)
    return own


def submit(slurm: Cluster, commands: str, folder: Path, *more: str, **changes: object) -> str:
    """Submit commands and return the number of the last job."""
    return submit_all(slurm, commands, folder, *more, **changes)[-1]


def submit_all(slurm: Cluster, commands: str, folder: Path, *more: str, **changes: object) -> list[str]:
    result = sbatch(slurm, [*ND, "submit", commands, "demo", *words_of(folder, **changes), *NODES, *more])
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r"submitted job (\d+)", result.stdout)


def wait_for_end(slurm: Cluster, job: str, folder: Path) -> None:
    """Wait until a job is done."""
    state = wait_for_state(slurm, job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert state == "COMPLETED", output(folder)


def output(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "run" / "slurm").glob("*.out")))


def curve(folder: Path) -> dict[tuple[int, int], float]:
    return losses(list(read_events(events_path(folder / "run", 0))))


def test_a_submitted_training_is_the_training_over_ssh(slurm: Cluster, trained: Path, folder: Path) -> None:
    job = submit(slurm, "train", folder)
    wait_for_end(slurm, job, folder)
    assert curve(folder) == curve(trained)
    assert hosts_of(folder / "run", "train", 2) == ["node1", "node2"]
    record_start("train, srun", folder / "run", "train", 2)
    wait_until_clear(slurm)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(5))
def test_pack_evaluate_and_sweep_run_over_two_nodes_every_time(
    turn: int, slurm: Cluster, trained: Path, folder: Path
) -> None:
    shutil.rmtree(folder / "shards")
    shutil.copytree(trained / "run" / "checkpoints", folder / "run" / "checkpoints")
    wait_for_end(slurm, submit(slurm, "pack,evaluate,sweep", folder), folder)
    for command in ("pack", "evaluate", "sweep"):
        assert hosts_of(folder / "run", command, 2) == ["node1", "node2"], command
        record_start(f"{command}, srun", folder / "run", command, 2)
    assert_equal_shards(folder, trained)
    wait_until_clear(slurm)


def test_a_job_whose_predecessor_failed_is_cancelled_and_does_not_wait_for_ever(slurm: Cluster, folder: Path) -> None:
    pack, train = submit_all(slurm, "pack,train", folder, "slurm.sbatch.hold=true")
    shutil.rmtree(folder / "nsd")  # before, it would not have been submitted
    query(slurm, ["scontrol", "release", f"{pack},{train}"])
    assert wait_for_state(slurm, pack, "FAILED", "COMPLETED") == "FAILED"
    assert wait_for_state(slurm, train, "CANCELLED", "RUNNING", "COMPLETED", "FAILED") == "CANCELLED"


@pytest.mark.slow
def test_the_grid_as_arrays_trains_every_network_and_makes_the_subjects_decoder(slurm: Cluster, folder: Path) -> None:
    small = ("slurm.nodes=1", "decoder.heads=single", "training.targets=[z,g02]", "--subjects", "1")
    jobs = submit_all(slurm, "train", folder, *small, training__steps="[8,4]")
    assert len(jobs) == 3
    wait_for_end(slurm, jobs[-1], folder)
    for network in ("z", "g02"):
        assert_both_stages(folder / "run" / "subj01" / network)
    merged = Decoder.load(folder / "run" / "subj01" / "checkpoints" / "stage2" / "model")
    assert {target.name for target in merged.targets} == {"z", "g02"}
    wait_until_clear(slurm)


@pytest.mark.slow
def test_two_subjects_are_trained_and_evaluated_by_one_command(slurm: Cluster, folder: Path) -> None:
    small = ("slurm.nodes=1", "decoder.heads=joint", "--subjects", "1,2")
    jobs = submit_all(slurm, "train,evaluate", folder, *small, training__steps="[8,4]")
    assert len(jobs) == 3
    wait_for_end(slurm, jobs[-1], folder)
    for subject in (1, 2):
        run_dir = folder / "run" / f"subj0{subject}"
        assert_both_stages(run_dir)
        assert {point["subject"] for point in metrics_points(run_dir)} == {subject}
    wait_until_clear(slurm)


def assert_both_stages(run_dir: Path) -> None:
    """Require every step of both stages once, in order."""
    events = list(read_events(events_path(run_dir, 0)))
    steps = [(event["stage"], event["step"]) for event in events if event["event"] == "train_step"]
    assert steps == [(1, step) for step in range(8)] + [(2, step) for step in range(4)]


INSIDE = {
    "of one node": (["srun", "-N1", "-n1", "-c2"], ["--ranks", "2"], ["node1", "node1"]),
    "of two nodes": (["salloc", "-N2", "--ntasks-per-node=1", "-c2", "srun", "-N1", "-n1"], ["--launcher", "srun"],
                     ["node1", "node2"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", INSIDE)
def test_evaluation_works_inside_an_interactive_step(kind: str, slurm: Cluster, trained: Path, folder: Path) -> None:
    """`srun --pty bash`: mpirun would ask Slurm for what the shell's own step holds, and wait for ever."""
    step, options, expected = INSIDE[kind]
    shutil.copytree(trained / "run" / "checkpoints", folder / "run" / "checkpoints")
    words = [*ND, "evaluate", "demo", *words_of(folder), "launch.start_s=300", *options]
    result = slurm.run("node1", [*step, *words])
    assert result.returncode == 0, result.stdout + result.stderr
    assert hosts_of(folder / "run", "evaluate", 2) == expected
    wait_until_clear(slurm)


@pytest.mark.slow
def test_a_submitted_sweep_array_gives_the_numbers_of_one_sweep(
    slurm: Cluster, hosts: Cluster, trained: Path, folder: Path
) -> None:
    run_nd(hosts, "node3", "sweep", "demo", *words_of(trained), "--ranks", "1")
    shutil.copytree(trained / "run" / "checkpoints", folder / "run" / "checkpoints")
    job = submit(slurm, "sweep", folder, "--array", "slurm.nodes=1", "slurm.ranks_per_node=2")
    for task in (0, 1):
        wait_for_end(slurm, f"{job}_{task}", folder)
    parts = sorted((folder / "run" / "sweep").iterdir())
    assert [path.name for path in parts] == ["kappa-10-eta-0.5", "kappa-10-eta-1"]
    found = [point for part in parts for point in metrics_points(part) if point["kappa"]]
    expected = [point for point in metrics_points(trained / "run") if point["kappa"]]
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.slow
def test_a_cancelled_job_is_gone_and_stays_cancelled(slurm: Cluster, folder: Path) -> None:
    job = submit(slurm, "train", folder, training__steps="[3000,4]")
    wait_for_step(folder, 8)
    query(slurm, ["scancel", job])
    wait_for_state(slurm, job, "CANCELLED", "FAILED", "COMPLETED")
    wait_until_clear(slurm)
    time.sleep(5)
    assert job_state(slurm, job) == "CANCELLED"


@pytest.mark.slow
def test_a_job_that_is_stopped_on_request_saves_and_stays_ended(slurm: Cluster, folder: Path) -> None:
    job = submit(slurm, "train", folder, training__steps="[3000,4]")
    wait_for_step(folder, 8)
    assert "stopped train" in run_nd(slurm, "node1", "stop", str(folder / "run"))
    wait_for_state(slurm, job, "FAILED", "PENDING")
    wait_until_clear(slurm)
    assert job_state(slurm, job) == "FAILED", "exit code 5, and not back in the queue"


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_itself_and_goes_on_exactly(slurm: Cluster, folder: Path) -> None:
    limits = ("slurm.time=3", "slurm.signal_s=30")  # Slurm warns up to a minute earlier than it was asked to
    job = submit(slurm, "train", folder, *limits, training__steps="[60000,4]")
    wait_for_step(folder, 8)
    run_queued_now(slurm, job)  # waits until it is back in the queue
    saved = max(step for _, step in curve(folder)) + 1
    assert "SIGTERM" in output(folder)
    wait_for_step(folder, saved + 3)
    query(slurm, ["scancel", job])
    events = list(read_events(events_path(folder / "run", 0)))
    loaded = [event["step"] for event in events if event["event"] == "checkpoint_loaded"]
    assert loaded == [saved]
    steps = [event["step"] for event in events if event["event"] == "train_step"]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_a_job_that_loses_a_node_goes_back_into_the_queue_and_goes_on(slurm: Cluster, folder: Path) -> None:
    job = submit(slurm, "train", folder, training__steps="[3000,4]")
    wait_for_step(folder, 12)
    began = time.monotonic()
    slurm.crash("node2")
    try:
        wait_for_state(slurm, job, "PENDING", "FAILED", "NODE_FAIL")
        record(fault="a node's whole process tree killed, sbatch", requeued_s=round(time.monotonic() - began, 1))
        wait_until_clear(slurm)
    finally:
        slurm.boot("node2")
        wait_for_nodes(slurm)
    assert job_state(slurm, job) == "PENDING", output(folder)
    assert_goes_on(slurm, job, folder)


@pytest.mark.slow
def test_a_job_on_a_node_whose_slurmd_died_is_requeued_by_slurm_and_goes_on(slurm: Cluster, folder: Path) -> None:
    job = submit(slurm, "train", folder, training__steps="[60000,4]")
    wait_for_step(folder, 12)
    began = time.monotonic()
    for pid, words in slurm.hosts["node2"].processes().items():
        if words.startswith("/usr/sbin/slurmd"):
            os.kill(pid, signal.SIGKILL)
    try:
        wait_for_state(slurm, job, "PENDING", "FAILED", "NODE_FAIL")
        record(fault="slurmd of a node killed, sbatch", requeued_s=round(time.monotonic() - began, 1))
        wait_until_clear(slurm)
    finally:
        slurm.crash("node2")
        slurm.boot("node2")
        wait_for_nodes(slurm)
    assert job_state(slurm, job) == "PENDING", output(folder)
    assert_goes_on(slurm, job, folder)


def assert_goes_on(slurm: Cluster, job: str, folder: Path) -> None:
    """Let a requeued training start now; it resumes from a checkpoint and repeats the losses bit for bit."""
    before = curve(folder)
    run_queued_now(slurm, job)

    def loaded() -> list[int]:
        events = read_events(events_path(folder / "run", 0))
        return [event["step"] for event in events if event["event"] == "checkpoint_loaded"]

    assert wait_until(loaded, "a loaded checkpoint")[0] >= 8
    wait_for_step(folder, max(step for _, step in before) + 2)
    query(slurm, ["scancel", job])
    wait_for_state(slurm, job, "CANCELLED", "FAILED", "COMPLETED")
    wait_until_clear(slurm)
    after = curve(folder)
    assert [after[key] for key in before] == list(before.values())


def wait_for_step(folder: Path, step: int) -> None:
    wait_until(lambda: max((at for _, at in curve(folder)), default=0) >= step, f"step {step}")


def test_ranks_that_srun_starts_without_pmi_and_without_a_place_to_meet_are_refused_and_never_work_alone(
    slurm: Cluster, folder: Path
) -> None:
    code = (
        "import os\nfrom nd_dist.comm import connect\nfrom nd_dist.world import World\n"
        "connect(World.from_env(os.environ))\n"
    )
    words = ["srun", "--mpi=none", "--ntasks=2", "--nodes=2", ND[0], "-c", code]
    result = slurm.run("node1", words)
    assert result.returncode != 0
    assert "MPI does not see the ranks that the launcher started" in result.stderr


def in_allocation(slurm: Cluster, options: list[str], words: list[str]) -> str:
    """Run a command in an allocation as a user does; require success and return its output."""
    result = slurm.run("node1", ["salloc", "--quiet", *options, *words])
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_nd_in_an_allocation_uses_every_node_by_itself(slurm: Cluster, trained: Path, folder: Path) -> None:
    in_allocation(slurm, ["-N2", "-n2"], [*ND, "train", "demo", *words_of(folder)])
    assert hosts_of(folder / "run", "train", 2) == ["node1", "node2"]
    assert curve(folder) == curve(trained)
    wait_until_clear(slurm)


def test_nodes_with_different_numbers_of_tasks_evaluate_without_mpi(
    slurm: Cluster, hosts: Cluster, trained: Path, folder: Path
) -> None:
    run_nd(hosts, "node3", "evaluate", "demo", *words_of(trained), "--ranks", "1")
    shutil.copytree(trained / "run" / "checkpoints", folder / "run" / "checkpoints")
    in_allocation(slurm, ["-N2", "-n4"], [*ND, "evaluate", "demo", *words_of(folder)])  # Slurm gives 3 and 1
    assert hosts_of(folder / "run", "evaluate", 4) == ["node1", "node1", "node1", "node2"]
    points = metrics_points(folder / "run")
    assert points
    assert all(point in metrics_points(trained / "run") for point in points)  # which may hold those of a sweep too
    wait_until_clear(slurm)


@pytest.mark.parametrize("option", ["--mpi=none", pytest.param("--mpi=pmi2", marks=pytest.mark.slow)])
def test_the_users_own_srun_trains_the_same(option: str, slurm: Cluster, trained: Path, folder: Path) -> None:
    words = ["srun", option, sys.executable, "-m", "launch.join", "train", "demo", *words_of(folder)]
    text = in_allocation(slurm, ["-N2", "-n2"], words)
    assert "train: done by 2 rank(s)" in text
    assert hosts_of(folder / "run", "train", 2) == ["node1", "node2"]
    assert curve(folder) == curve(trained)


@pytest.mark.slow
def test_torchrun_and_mpirun_below_srun_train_the_same(slurm: Cluster, trained: Path, folder: Path) -> None:
    beside = Path(sys.executable).parent
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29400", "--rdzv-id", "1"]
    torchrun = ["srun", str(beside / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meeting, "-m"]
    mpirun = [str(beside / "mpirun"), "-n", "2", sys.executable, "-m"]
    for launcher in (torchrun, mpirun):
        words = ["launch.join", "train", "demo", *words_of(folder)]
        in_allocation(slurm, ["-N2", "--ntasks-per-node=1"], [*launcher, *words])
        assert curve(folder) == curve(trained)
        shutil.rmtree(folder / "run")


def test_ranks_under_srun_get_what_the_shell_of_the_allocation_has(slurm: Cluster, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.support.launch_program", "train", str(folder / "run"), "environment"]
    shell = {**slurm.environment(), **SHELL, "CUDA_VISIBLE_DEVICES": "4,5", "SLURM_EXPORT_ENV": "NONE"}
    words = ["salloc", "--quiet", "-N2", "-n2", *command, *WORDS]
    result = slurm.run("node1", words, env=shell)
    assert result.returncode == 0, result.stdout + result.stderr
    environments = rank_environments(folder / "run", 2)
    assert [found["SLURM_PROCID"] for found in environments] == ["0", "1"]
    assert_as_planned(environments)
    assert [found["CUDA_VISIBLE_DEVICES"] for found in environments] == ["4,5", "4,5"]
