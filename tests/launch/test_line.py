"""The whole line with real launchers on a very small phantom: phantom, pack, train, evaluate, sweep, report."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nd_dist.events import events_path, read_events
from nd_dist.frozen.folders import resolve_folder
from tests.support.command_line import ND, Ended, nd_process

pytestmark = pytest.mark.launch
TINY = [
    "phantom.num_subjects=3", "phantom.num_sessions=2", "phantom.trials_per_session=24", "phantom.num_shared=6",
    "phantom.num_voxels=60", "data.subjects=[1,2,3]", "decoder.kind=neuraldiffuser", "decoder.hidden_size=16",
    "training.steps=[6,6]", "training.samples_per_subject=[2,4]", "training.checkpoint_every=3",
    "sampler.num_steps=4", "sampler.kappa=10",
    "evaluation.num_images=4", "evaluation.num_repeats=2", "evaluation.batch_size=2", "evaluation.bootstrap=100",
    "sweep.kappa=[10]", "sweep.eta=[0.5,1.0]", "sweep.num_images=2", "evaluation.controls=false",
    "decoder.prior_depth=1", "decoder.prior_dim_head=8", "model=CompVis/stable-diffusion-v1-4",
    "guidance_model=openai/clip-vit-base-patch32", f"evaluation.judges_dir={resolve_folder('phantom/judges')}",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The phantom's networks under the names of the real ones, in a Hugging Face cache."""
    cache = tmp_path_factory.mktemp("hub")
    names = {"CompVis--stable-diffusion-v1-4": "stable-diffusion", "openai--clip-vit-base-patch32": "clip-vision"}
    for name, model in names.items():
        snapshots = cache / f"models--{name}" / "snapshots"
        snapshots.mkdir(parents=True)
        (snapshots / "1a2b").symlink_to(resolve_folder(f"phantom/{model}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(cache))
        yield


def words_of(folder: Path) -> list[str]:
    return [*TINY, f"nsd_root={folder / 'nsd'}", f"shards_dir={folder / 'shards'}", f"run_dir={folder / 'run'}"]


def nd(*words: str) -> Ended:
    result = nd_process(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def points_of(folder: Path, run: str = "run") -> Any:
    return json.loads((folder / run / "metrics.json").read_text())["points"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `nd demo` ran with two ranks in every stage."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "output").write_text(nd("demo", *words_of(folder), "--ranks", "2").stdout)
    return folder


def test_a_training_is_estimated_from_steps_that_are_forgotten(finished: Path) -> None:
    run_dir = finished / "estimated"
    said = nd("train", "demo", *words_of(finished), f"run_dir={run_dir}", "training.steps=[3600,36000]", "--estimate")
    paces = re.findall(r"stage \d: ([\d,]+) steps of ([\d.e-]+) s, ([\d.e+-]+) hours", said.stdout)
    assert [steps for steps, _, _ in paces] == ["3,600", "36,000"]
    for steps, pace, hours in paces:
        assert float(hours) == pytest.approx(int(steps.replace(",", "")) * float(pace) / 3600, rel=0.06)
    assert not (run_dir / "estimate").exists()


def test_a_grid_is_estimated_from_one_training_of_each_kind(finished: Path) -> None:
    run_dir = finished / "estimated"
    words = [*words_of(finished), f"run_dir={run_dir}", "training.steps=[3600,36000]", "decoder.heads=single"]
    targets = "training.targets=[z,g02,g04]"  # z is of one kind, the others are of another
    places = ["--subjects", "1,2", "--at-once", "2", "--ranks", "1"]
    said = nd("train", "demo", *words, targets, *places, "--estimate").stdout
    kinds = re.findall(r"estimate: (\w+) stage (\d): .* ([\d.e+-]+) hours .* ([\d,]+) files", said)
    assert [kind[:2] for kind in kinds] == [("z", "1"), ("z", "2"), ("g02", "1"), ("g02", "2")]
    found = re.search(r"12 trainings, 2 at once: ([\d.e+-]+) hours \(([\d.e+-]+) one .* ([\d,]+) files", said)
    assert found, said
    times = {"z": 2, "g02": 4}  # networks of a kind, over both subjects
    work = sum(times[network] * float(hours) for network, _, hours, _ in kinds)
    assert float(found[2]) == pytest.approx(work, rel=0.1)
    assert work / 2 * 0.9 <= float(found[1]) < work
    assert int(found[3]) == sum(times[network] * int(files) for network, _, _, files in kinds)
    assert not (run_dir / "estimate").exists()


def test_the_demo_leaves_the_documented_run_folder(finished: Path) -> None:
    run_dir = finished / "run"
    for name in ("config.yaml", "events/rank-0000.jsonl", "events/rank-0001.jsonl", "checkpoints", "reconstructions"):
        assert (run_dir / name).exists(), name
    assert "<html" in (run_dir / "report.html").read_text()


def test_the_metrics_file_has_the_documented_shape(finished: Path) -> None:
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert metrics["protocol"]
    assert metrics["provenance"]["seed"] == 0
    assert {(point["kappa"], point["eta"]) for point in metrics["points"]} == {(0, 0), (10, 0.5), (10, 1)}
    for point in metrics["points"]:
        assert point["subject"] == 1
        for value in point["metrics"].values():
            assert {"value", "ci_low", "ci_high", "n", "higher_is_better"} <= set(value)


def test_both_ranks_train_both_stages_step_by_step(finished: Path) -> None:
    steps = [e for e in read_events(events_path(finished / "run", 0)) if e["event"] == "train_step"]
    assert [(step["stage"], step["step"]) for step in steps] == [(s, k) for s in (1, 2) for k in range(6)]
    paces = [e for e in read_events(events_path(finished / "run", 1)) if e["event"] == "pace"]
    assert [sum(pace["steps"] for pace in paces if pace["stage"] == s) for s in (1, 2)] == [6, 6]


def test_running_the_demo_again_repeats_nothing_and_keeps_the_metrics(finished: Path) -> None:
    before = (finished / "run" / "metrics.json").read_bytes()
    steps = sum(e["event"] == "train_step" for e in read_events(events_path(finished / "run", 0)))
    nd("demo", *words_of(finished), "--ranks", "2")
    assert (finished / "run" / "metrics.json").read_bytes() == before
    assert sum(e["event"] == "train_step" for e in read_events(events_path(finished / "run", 0))) == steps


def test_a_stage_is_one_line_on_the_terminal_and_its_shapes_stand_in_the_ranks_log(finished: Path) -> None:
    lines = (finished / "output").read_text().splitlines()
    assert [line.split(":")[0].strip() for line in lines if "million parameters" in line] == ["stage 1", "stage 2"]
    log = (finished / "run" / "logs" / "train" / "rank-0000.log").read_text()
    for stage in (1, 2):
        assert f"stage {stage}: parameters {{'voxels." in log
        assert f"stage {stage}: this rank's first batch {{'rows': 2" in log


def test_a_dry_run_of_what_would_start_says_so(finished: Path) -> None:
    for command in (["train"], ["train", "--all-targets"], ["evaluate"]):
        assert nd(*command, "demo", *words_of(finished), "--dry-run").stdout.endswith("# would start\n")


@pytest.mark.slow
def test_one_rank_reconstructs_to_the_same_metrics_as_two(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    words = [*words_of(finished), f"run_dir={tmp_path / 'run'}"]
    nd("evaluate", "demo", *words, "--ranks", "1")
    nd("sweep", "demo", *words, "--ranks", "1")
    assert points_of(tmp_path) == points_of(finished)


def test_the_sweep_chose_a_point_on_training_images_and_its_cost_can_be_asked_for(finished: Path) -> None:
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    assert len(metrics["selection"]["candidates"]) == 3
    assert set(metrics["selection"]["images"]["1"]).isdisjoint(metrics["images"]["1"])
    result = nd("sweep", "demo", *words_of(finished), "sweep.kappa=[20]", "--ranks", "2", "--estimate")
    assert "GPU-hours" in result.stdout
    assert json.loads((finished / "run" / "metrics.json").read_text()) == metrics


def test_two_runs_join_into_one_table(finished: Path, tmp_path: Path) -> None:
    nd("merge", str(tmp_path / "joined"), str(finished / "run"), str(finished / "run"))
    assert points_of(tmp_path, "joined") == points_of(finished)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [2, 6, 12, 18, 24, 30])
def test_a_demo_killed_at_any_moment_goes_on_and_ends_with_the_same_metrics(
    finished: Path, tmp_path: Path, after_s: int
) -> None:
    process = subprocess.Popen([*ND, "demo", *words_of(tmp_path), "--ranks", "2"], stdout=subprocess.DEVNULL)
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    nd("demo", *words_of(tmp_path), "--ranks", "2")
    assert points_of(tmp_path) == points_of(finished)


def test_the_whole_line_runs_on_laion_fmris_layout_and_refuses_another_split(tmp_path: Path) -> None:
    words = [
        *(word for word in words_of(tmp_path) if not word.startswith(("data.subjects", "evaluation.num_images"))),
        *(
            "phantom.num_subjects=2",
            "phantom.num_sessions=4",
            "phantom.trials_per_session=40",
            "phantom.num_shared=12",
        ),
        "data.subjects=[1,3]",
    ]
    for command in ("pack", "train", "evaluate"):
        if command == "pack":
            nd("phantom", str(tmp_path / "nsd"), "--recipe", "laion_fmri_demo", *words)
        nd(command, "laion_fmri_demo", *words, "--ranks", "1")
    nd("report", str(tmp_path / "run"))
    point = points_of(tmp_path)[0]
    assert {"OOD", "not OOD", "LAION"} <= set(point["groups"])
    assert {"retrieval", "drop", "dimension"} <= set(point["generalisation"])
    page = (tmp_path / "run/report.html").read_text()
    assert "Reconstructed, or retrieved?" in page
    assert "Subject 1 (sub-01)" in page
    refused = nd_process("evaluate", "laion_fmri_demo", *words, "data.split=tau", "--ranks", "1")
    assert refused.returncode == 3
    assert "trained on another split" in refused.stderr + refused.stdout
    for command in ("train", "evaluate"):
        nd(command, "laion_fmri_demo", *words, "data.split=tau", f"run_dir={tmp_path / 'tau'}", "--ranks", "1")
    table = nd("splits", str(tmp_path / "run"), str(tmp_path / "tau")).stdout
    own, tau = (points_of(tmp_path, run)[-1]["metrics"]["pixcorr"]["value"] for run in ("run", "tau"))
    for value in (own, tau, abs(tau - own)):
        assert f"{abs(value):.3f}".lstrip("0") in table, table
    assert all(f"{split}, subject 1" in " ".join(table.split()) for split in ("own", "tau")), table


@pytest.mark.slow
def test_networks_that_a_grid_trained_one_by_one_are_evaluated_as_one_decoder(finished: Path, tmp_path: Path) -> None:
    words = [*words_of(finished), "decoder.heads=single", f"run_dir={tmp_path}"]
    nd("train", "demo", *words, "--all-targets", "--stages", "2", "--at-once", "2")
    nd("evaluate", "demo", *words, f"run_dir={tmp_path / 'subj01'}")
    assert {(point["kappa"], point["eta"]) for point in points_of(tmp_path, "subj01")} == {(0, 0), (10, 1)}
