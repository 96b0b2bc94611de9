"""`python -m launch.join` under the launchers that are here: it trains as `nd train`, with its lock and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.plans.environment import is_foreign
from nd_dist.events import events_path, read_events
from tests.ranks.launching import free_port
from tests.support.rank_processes import assert_gone
from tests.support.waiting import HANG_S, wait_until

pytestmark = pytest.mark.launch
JOIN = ["-m", "launch.join"]
ND = [sys.executable, "-m", "launch.cli"]
TINY = [
    "phantom.num_subjects=2", "phantom.num_sessions=2", "phantom.trials_per_session=24", "phantom.num_shared=6",
    "phantom.num_voxels=60", "data.subjects=[1,2]", "decoder.kind=neuraldiffuser", "decoder.hidden_size=16",
    "training.stages=[2]", "training.steps=[4,4]", "training.samples_per_subject=[2,4]", "training.checkpoint_every=2",
    "sampler.num_steps=2", "sampler.kappa=10", "evaluation.num_images=2", "evaluation.num_repeats=1",
    "evaluation.controls=false", "evaluation.baseline=false", "evaluation.image_groups=null",
    "evaluation.image_classes=null", "evaluation.bootstrap=100", "sweep.kappa=[10]",
    "sweep.eta=[1.0]", "sweep.num_images=2",
]  # fmt: skip
SHELL = {name: value for name, value in os.environ.items() if not is_foreign(name)}


def launchers() -> dict[str, Callable[[], list[str]]]:
    """Return what a user types in front of ``-m launch.join``, by launcher."""
    beside = Path(sys.executable).parent
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    return {
        "deepspeed": lambda: [*deepspeed, "--master_port", str(free_port()), "--module", "launch.join"],
        "torchrun": lambda: [
            str(beside / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), *JOIN,
        ],
        "mpirun": lambda: [str(beside / "mpirun"), "-n", "2", sys.executable, *JOIN],
    }  # fmt: skip


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env={**SHELL, **variables}, capture_output=True, text=True, timeout=HANG_S, check=False
    )


def start_ranks(num_ranks: int, *words: str) -> list[subprocess.Popen[str]]:
    """Start ranks as a launcher would that does nothing else."""
    shared = {**SHELL, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *JOIN, *words], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip


def ends_of(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        texts = [rank.communicate(timeout=HANG_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, texts, strict=True)]


def events(run_dir: Path, rank: int = 0) -> list[dict[str, Any]]:
    return list(read_events(events_path(run_dir, rank)))


def curve(run_dir: Path) -> dict[tuple[int, int], float]:
    return {(e["stage"], e["step"]): e["loss"] for e in events(run_dir) if e["event"] == "train_step"}


def wait_for_step(run_dir: Path, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    def is_there() -> bool:
        assert all(rank.poll() is None for rank in ranks), ends_of(ranks)
        return any(e["event"] == "train_step" and e["step"] >= step for e in events(run_dir))

    wait_until(is_there, f"step {step}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed shards and, in ``nd``, what `nd train --ranks 2` and `nd evaluate` made of them."""
    folder = tmp_path_factory.mktemp("join")
    for words in (["phantom", str(folder / "nsd")], ["pack", "demo"], ["train", "demo", "--ranks", "2"],
                  ["evaluate", "demo", "--ranks", "2"]):  # fmt: skip
        result = run(*ND, *words, *words_of(folder, "nd"))
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def words_of(folder: Path, name: str) -> list[str]:
    return [*TINY, f"nsd_root={folder / 'nsd'}", f"shards_dir={folder / 'shards'}", f"run_dir={folder / name}"]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_two_ranks_under_the_users_own_launcher_train_as_under_nd(launcher: str, folder: Path) -> None:
    result = run(*launchers()[launcher](), "train", "demo", *words_of(folder, launcher))
    assert result.returncode == 0, result.stdout + result.stderr
    assert curve(folder / launcher) == curve(folder / "nd")
    assert "train: done by 2 rank(s)" in result.stdout
    assert "stage 2: 4/4" in result.stdout
    for rank in range(2):
        ends = [event for event in events(folder / launcher, rank) if event["event"].startswith("rank_")]
        assert [(event["event"], event.get("size")) for event in ends] == [("rank_start", 2), ("rank_done", None)]
    left = {path.name for path in (folder / launcher / ".state").rglob("*") if path.is_file()}
    assert left == {"launcher.lock", "ranks.lock", "request.json"}


@pytest.mark.parametrize(
    ("launcher", "command"),
    [("torchrun", "evaluate"), ("mpirun", "sweep")]
    + [
        pytest.param(launcher, command, marks=pytest.mark.slow)
        for launcher, command in [("mpirun", "evaluate"), ("deepspeed", "evaluate"), ("torchrun", "sweep")]
    ],
)
def test_other_commands_give_the_numbers_of_nd(launcher: str, command: str, folder: Path) -> None:
    name = f"{launcher}-{command}"
    shutil.copytree(folder / "nd" / "checkpoints", folder / name / "checkpoints")
    result = run(*launchers()[launcher](), command, "demo", *words_of(folder, name))
    assert result.returncode == 0, result.stdout + result.stderr
    points = [json.loads((folder / run_name / "metrics.json").read_text())["points"] for run_name in (name, "nd")]
    for point in points[1]:
        assert point["metrics"] in [each["metrics"] for each in points[0]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_shards_packed_under_the_users_own_launcher_are_those_of_nd(
    launcher: str, folder: Path, tmp_path: Path
) -> None:
    words = [*words_of(folder, launcher), f"shards_dir={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"]
    result = run(*launchers()[launcher](), "pack", "demo", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    for path in (folder / "shards").rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "shards" / path.relative_to(folder / "shards")).read_bytes()


def test_the_run_is_held_seen_stopped_and_taken_up_again(folder: Path) -> None:
    words = ["train", "demo", *words_of(folder, "held"), "training.steps=[4,4000]"]
    ranks = start_ranks(2, *words)
    wait_for_step(folder / "held", 2, ranks)
    assert "running train" in run(*ND, "status", str(folder / "held")).stdout
    recipe = (folder / "held" / "config.yaml").read_bytes()
    other = run(*ND, *words, "sampler.kappa=5")
    for code, text in [*ends_of(start_ranks(2, *words, "sampler.kappa=5")), (other.returncode, other.stderr)]:
        assert code == 3, text
        assert "Another command works in this run folder" in text
    assert (folder / "held" / "config.yaml").read_bytes() == recipe
    ranks[0].send_signal(signal.SIGTERM)
    (code, text), (other_code, _) = ends_of(ranks)
    assert (code, other_code) == (5, 5), text
    assert "Stopped by SIGTERM" in text
    saved = [event["step"] for event in events(folder / "held") if event["event"] == "checkpoint_saved"][-1]
    assert saved == max(step for _, step in curve(folder / "held")) + 1
    again = start_ranks(2, *words)
    wait_for_step(folder / "held", saved + 1, again)
    again[0].send_signal(signal.SIGTERM)
    assert [code for code, _ in ends_of(again)] == [5, 5]
    loaded = [event["step"] for event in events(folder / "held") if event["event"] == "checkpoint_loaded"]
    assert loaded == [saved]


def test_kill_9_of_a_rank_ends_all_and_is_named_by_the_process_of_rank_0(folder: Path) -> None:
    ranks = start_ranks(2, "train", "demo", *words_of(folder, "killed"), "training.steps=[4,4000]")
    wait_for_step(folder / "killed", 2, ranks)
    pids = [event["pid"] for rank in range(2) for event in events(folder / "killed", rank)
            if event["event"] == "rank_start"]  # fmt: skip
    os.kill(pids[1], signal.SIGKILL)
    (code, text), (other_code, _) = ends_of(ranks)
    assert (code, other_code) == (4, 4), text
    assert "Rank 1 on" in text
    assert "killed by SIGKILL" in text
    assert_gone(pids)


def test_kill_9_of_the_process_of_rank_0_leaves_no_rank(folder: Path) -> None:
    ranks = start_ranks(2, "train", "demo", *words_of(folder, "headless"), "training.steps=[4,4000]")
    wait_for_step(folder / "headless", 2, ranks)
    pids = [event["pid"] for rank in range(2) for event in events(folder / "headless", rank)
            if event["event"] == "rank_start"]  # fmt: skip
    ranks[0].kill()
    assert [code for code, _ in ends_of(ranks)] == [-signal.SIGKILL, 4]
    assert_gone(pids)


def test_what_rank_0_finds_wrong_ends_every_rank_before_the_work(folder: Path, tmp_path: Path) -> None:
    words = [*words_of(folder, "none"), f"shards_dir={tmp_path / 'none'}"]
    for code, text in ends_of(start_ranks(3, "train", "demo", *words)):
        assert code == 3, text
        assert "nd pack" in text
    assert not (folder / "none" / "events").exists()


def test_a_rank_that_never_comes_is_named(folder: Path) -> None:
    first, *_ = ranks = start_ranks(1, "train", "demo", *words_of(folder, "alone"))
    ends_of(ranks)  # a world of one
    assert first.returncode == 0
    shared = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = ["train", "demo", *words_of(folder, "lonely"), "launch.start_s=5", "training.samples_per_subject=[3,3]"]
    result = run(sys.executable, *JOIN, *words, **shared)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "Ranks [1, 2] have not come" in result.stderr


def test_deepspeed_with_such_a_module_is_no_success(folder: Path) -> None:
    *runner, _ = launchers()["deepspeed"]()
    result = run(*runner, "launch.ranks.train", "demo", *words_of(folder, "nothing"))
    assert result.returncode == 2
    assert "python -m launch.join train RECIPE" in result.stderr
    boundary = run(*runner, "--no_local_rank", "launch.ranks.rank", "launch.ranks.train", "recipe.yaml", "L1")
    assert boundary.returncode != 0
    assert "python -m launch.join train RECIPE" in boundary.stderr
