"""`nd submit` with a stand-in for sbatch that numbers the jobs and keeps what it was given."""

import shlex
from pathlib import Path

import pytest

from launch.commands.submit import plan_jobs, submit_command
from launch.grid.plan import GridRequest
from launch.recipe import load_recipe
from nd_dist.config import Config
from nd_dist.errors import ConfigError, RankFailure
from nd_dist.schema import TARGETS
from tests.support.shard_index import write_index

SBATCH = """\
#!/bin/sh
echo "$@" >> {folder}/calls
number=$(wc -l < {folder}/calls)
[ $number -lt {refused} ] || {{ echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }}
echo "$((100 + number));brain"
"""
SINGLE = ("decoder.heads=single", "data.subjects=[1,2,5]")


def words_of(folder: Path, *words: str) -> list[str]:
    places = [f"run_dir={folder / 'my run'}", f"shards_dir={folder / 'shards'}"]
    return [*places, "evaluation.image_groups=null", "evaluation.image_classes=null", *words]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_index(tmp_path / "shards")


def recipe(folder: Path, *words: str) -> Config:
    return load_recipe("demo", words_of(folder, *words))


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the calls of a stand-in for sbatch; it refuses the fourth job."""
    (tmp_path / "sbatch").write_text(SBATCH.format(folder=tmp_path, refused=4))
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "calls"


@pytest.mark.usefixtures("shards")
def test_commands_joined_by_commas_run_one_after_the_other(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_command("train,evaluate,sweep", "demo", words_of(tmp_path), False, None, False)
    said = capsys.readouterr().out
    folder = tmp_path / "my run" / "slurm"
    dependent = "--kill-on-invalid-dep=yes"
    assert sbatch.read_text().splitlines() == [
        f"--parsable {folder / 'train.sbatch'}",
        f"--parsable --dependency=afterok:101 {dependent} {folder / 'evaluate.sbatch'}",
        f"--parsable --dependency=afterok:102 {dependent} {folder / 'sweep.sbatch'}",
    ]
    assert "submitted job 103 (sweep, afterok the one before)" in said
    assert "no memory is asked for" in said
    assert load_recipe(str(tmp_path / "my run" / "config.yaml")) == recipe(tmp_path)


@pytest.mark.usefixtures("shards")
def test_jobs_that_were_submitted_before_one_was_refused_are_named(tmp_path: Path, sbatch: Path) -> None:
    with pytest.raises(RankFailure, match=r"QOSMaxSubmitJobPerUserLimit(.|\n)*scancel 101 102 103"):
        submit_command("train,evaluate,evaluate,sweep", "demo", words_of(tmp_path), False, None, False)


def test_the_grid_is_an_array_for_each_stage_whose_tasks_wait_for_their_own_first_stage(tmp_path: Path) -> None:
    jobs = plan_jobs(["train", "evaluate"], recipe(tmp_path, *SINGLE), False, GridRequest((1, 5), (), True))
    assert [(job.name, job.after, len(job.tasks)) for job in jobs] == [
        ("train-stage1", "", 16),
        ("train-stage2", "aftercorr", 16),
        ("train-merge", "afterok", 0),
        ("evaluate", "afterok", 2),
    ]
    run_dir = tmp_path / "my run"
    for first, second in zip(jobs[0].tasks, jobs[1].tasks, strict=True):
        assert first[:3] == second[:3]
        assert (first[3], second[3]) == ("training.stages=[1]", "training.stages=[2]")
    assert jobs[0].tasks[len(TARGETS)][:2] == (f"run_dir={run_dir}/subj05/{TARGETS[0]}", "training.target_subject=5")
    assert {job.config_path.name for job in jobs[:3]} == {"grid.yaml"}
    assert jobs[2].words == ("--all-targets", "--subjects", "1,5", "--launcher", "local")
    assert jobs[3].tasks[1] == (f"run_dir={run_dir}/subj05", "training.target_subject=5")


def test_a_joint_decoder_is_one_task_for_each_subject_and_needs_no_merging(tmp_path: Path) -> None:
    config = recipe(tmp_path, "decoder.heads=joint", "data.subjects=[1,2,5]", "training.stages=[2]")
    jobs = plan_jobs(["train"], config, False, GridRequest((1, 2)))
    assert [(job.name, job.after, len(job.tasks)) for job in jobs] == [("train-stage2", "", 2)]


def test_the_merging_job_asks_for_one_rank_only(tmp_path: Path) -> None:
    config = recipe(tmp_path, *SINGLE, "slurm.nodes=4", "slurm.ranks_per_node=8")
    jobs = plan_jobs(["train"], config, False, GridRequest(all_targets=True))
    assert [(job.slurm.nodes, job.slurm.ranks_per_node) for job in jobs] == [(4, 8), (4, 8), (1, 1)]


@pytest.mark.usefixtures("shards")
def test_each_point_of_a_sweep_array_has_a_folder_with_the_trained_decoder(tmp_path: Path, sbatch: Path) -> None:
    words = words_of(tmp_path, "sweep.kappa=[1,1e5]", "sweep.eta=[0.1,1]", "evaluation.embeddings=ground_truth")
    submit_command("sweep", "demo", words, True, None, False)
    run_dir = tmp_path / "my run"
    (run_dir / "checkpoints").mkdir()
    lines = (run_dir / "slurm" / "sweep.sbatch").read_text().splitlines()
    tasks = [shlex.split(line)[3:-1] for line in lines if " set -- " in line]
    folders = ["kappa-1-eta-0.1", "kappa-1-eta-1", "kappa-100000-eta-0.1", "kappa-100000-eta-1"]
    assert [task[0] for task in tasks] == [f"run_dir={run_dir}/sweep/{name}" for name in folders]
    assert tasks[2][1:] == ["sweep.kappa=[100000]", "sweep.eta=[0.1]"]
    for name in folders:
        assert (run_dir / "sweep" / name / "checkpoints").resolve() == run_dir / "checkpoints"
    submit_command("sweep", "demo", words, True, None, False)


@pytest.mark.parametrize(
    ("commands", "is_array", "grid", "message"),
    [
        ("demo", False, None, "Such a command"),
        ("pack,", False, None, "Such a command"),
        ("train", True, None, "--array"),
        ("sweep", True, GridRequest((1,)), "--array"),
        ("pack", False, GridRequest((1,)), "--all-targets"),
    ],
)
def test_words_that_nothing_would_come_of_are_refused(
    commands: str, is_array: bool, grid: GridRequest | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_jobs(commands.split(","), recipe(tmp_path), is_array, grid)
