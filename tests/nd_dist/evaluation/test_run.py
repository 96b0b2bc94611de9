"""Whole evaluations on toy networks: equal numbers however they were made, resumed, shared or interrupted."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nd_dist.comm import Comm
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, DataError, Requeue
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.partial import partial_metrics
from nd_dist.evaluation.points.units import Point, grid_points
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.fanout.results import read_png, read_record
from nd_dist.metrics.pixel import pixel_correlation
from nd_dist.report.report import write_report
from tests.nd_dist.evaluation.toy_world import TEST_IMAGES, ToySource, toy_job, write_models
from tests.nd_dist.frozen.toy_folders import hash_files
from tests.support.waiting import HANG_S, wait_until

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

SLOW = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks and one finished, uninterrupted evaluation in ``run``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    run(toy_job(folder))
    return folder


def run(job: Job, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    return evaluate(job, Comm(), EventLog(job.config.run_dir, 0, "evaluate"), should_stop)


def numbers(run_dir: Path) -> dict[str, Any]:
    """Return metrics.json without its provenance."""
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    del metrics["provenance"]
    return metrics


def pictures(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "reconstructions"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def events(run_dir: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in read_events(events_path(run_dir, rank)) if event["event"] == name]


def test_another_decoder_stands_beside_as_a_control_with_retrieval_of_its_own(world: Path, tmp_path: Path) -> None:
    write_models(tmp_path, seed=10)
    job = toy_job(world, "beside", subjects=[1], baseline=False)
    ridge = dataclasses.replace(job.points[0], control="ridge")
    run(dataclasses.replace(job, points=(*job.points, ridge), ridge_dir=tmp_path / "decoder"))
    content = numbers(job.config.run_dir)
    (own,), (control,) = content["points"], content["controls"]
    assert control["control"] == "ridge"
    assert control["metrics"]["pixcorr"] != own["metrics"]["pixcorr"]
    assert {"image_retrieval", "brain_retrieval"} <= set(control["metrics"])
    assert [entry["control"] for entry in content["comparisons"]] == ["ridge"]


def test_the_metrics_file_has_both_points_with_all_metrics(world: Path) -> None:
    metrics = json.loads((world / "run" / "metrics.json").read_text())
    assert metrics["protocol"] == "nd"
    assert metrics["simulated"] is True
    assert metrics["provenance"]["seed"] == 3
    assert [(point["kappa"], point["eta"], point["subject"]) for point in metrics["points"]] == [
        (0, 0, 1),
        (10, 0.5, 1),
    ]
    expected = {"pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim", "plain_early", "plain_late", "residual", "mixer"}
    expected |= {"depthwise", "image_retrieval", "brain_retrieval", "decoded_c", "decoded_z", "decoded_g"}
    for point in metrics["points"]:
        assert set(point["metrics"]) == expected
        for item in point["metrics"].values():
            assert (item["ci_low"], item["ci_high"]) == (None, None), "four images give no interval"
            assert item["n"] == TEST_IMAGES
    assert [entry["against"] for entry in metrics["comparisons"]] == ["no guidance"]


def test_every_picture_is_on_disk_with_its_hash_and_the_numbers_come_from_it(world: Path) -> None:
    run_dir = world / "run"
    assert len(pictures(run_dir)) == TEST_IMAGES + 2 * 2 * TEST_IMAGES
    point = next(entry for entry in numbers(run_dir)["points"] if entry["kappa"] == 10)
    values = []
    for image_id in range(TEST_IMAGES):
        folder = run_dir / point["folder"] / f"image-{image_id:05d}"
        seen = read_png(run_dir / "reconstructions" / "original" / folder.name / "picture.png")
        assert len(read_record(folder)["noise_seeds"]) == 2
        for name in ("repeat-0.png", "repeat-1.png"):
            pair = [torch.from_numpy(np.stack([p])).permute(0, 3, 1, 2) / 255 for p in (read_png(folder / name), seen)]
            values.append(pixel_correlation(*pair).item())
    assert point["metrics"]["pixcorr"]["value"] == pytest.approx(np.mean(values), abs=1e-12)


def test_running_again_does_nothing_and_changes_nothing(world: Path) -> None:
    before = (world / "run" / "metrics.json").read_bytes()
    run(toy_job(world))
    assert (world / "run" / "metrics.json").read_bytes() == before
    work = events(world / "run", "evaluation_done")[-1]["work"]
    assert sum(tally["done"] for tally in work.values()) == 0


class EarlierNetworks(Networks):
    """Networks that are identified by their files, as earlier versions did."""

    def identity(self, config: Config) -> dict[str, str | bool]:
        model = Path(config.model)
        parts = {part: hash_files(model / part) for part in ("unet", "vae", "text_encoder")}
        return {**super().identity(config), **parts, "guidance": hash_files(Path(config.guidance_model))}


def test_what_an_earlier_version_evaluated_by_the_hashes_of_its_files_is_kept(world: Path) -> None:
    job = toy_job(world, "earlier", num_images=1)
    run(dataclasses.replace(job, networks=EarlierNetworks(job.config, torch.device("cpu"))))
    before = (world / "earlier" / "metrics.json").read_bytes()
    run(job)
    assert sum(tally["done"] for tally in events(world / "earlier", "evaluation_done")[-1]["work"].values()) == 0
    assert (world / "earlier" / "metrics.json").read_bytes() == before


def test_images_in_a_unit_do_not_change_a_bit(world: Path) -> None:
    for size in (1, 4):
        run(toy_job(world, f"batch-{size}", batch_size=size))
        assert numbers(world / f"batch-{size}") == numbers(world / "run"), "2 images in a unit there"
        assert pictures(world / f"batch-{size}") == pictures(world / "run")


def test_a_rank_that_is_asked_to_stop_resumes_to_the_same_numbers(world: Path) -> None:
    for allowed in (2, 3, 100):
        asked = iter([False] * allowed * 3 + [True] * 10_000)
        try:
            run(toy_job(world, "stopped"), lambda asked=asked: next(asked))  # type: ignore[misc]
        except Requeue:
            assert not (world / "stopped" / "metrics.json").exists()
    assert numbers(world / "stopped") == numbers(world / "run")


def test_a_torn_result_is_made_again(world: Path) -> None:
    shutil.copytree(world / "run", world / "torn")
    job = toy_job(world, "torn")
    for name in ("evaluation/judged", "evaluation/scores", "metrics.json"):
        path = world / "torn" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(world / "torn" / "reconstructions" / "unguided" / "subj01" / "image-00001")
    run(job)
    assert numbers(world / "torn") == numbers(world / "run")
    assert pictures(world / "torn") == pictures(world / "run")


def test_a_changed_picture_is_refused_by_name(world: Path) -> None:
    shutil.copytree(world / "run", world / "changed")
    shutil.rmtree(world / "changed" / "evaluation")
    folder = world / "changed" / "reconstructions" / "unguided" / "subj01" / "image-00002"
    shutil.copy(folder / "repeat-0.png", folder / "repeat-1.png")
    with pytest.raises(DataError, match=r"image-00002"):
        run(toy_job(world, "changed"))


def test_another_seed_in_the_same_folder_is_kept_apart_and_comes_back_untouched(world: Path) -> None:
    shutil.copytree(world / "run", world / "seeds")
    job = toy_job(world, "seeds")
    other = dataclasses.replace(job, config=job.config.model_copy(update={"seed": 4}))
    run(other)
    assert numbers(world / "seeds")["points"] != numbers(world / "run")["points"]
    assert {event["done"] for event in events(world / "seeds", "results_of_other_settings")} == {"moved"}
    run(job)
    assert numbers(world / "seeds") == numbers(world / "run")
    work = events(world / "seeds", "evaluation_done")[-1]["work"]
    assert work["reconstruct"]["done"] == 0


def test_points_of_other_images_are_set_aside_with_a_word_and_come_back(world: Path) -> None:
    shutil.copytree(world / "run", world / "fewer")
    before = numbers(world / "fewer")
    job = toy_job(world, "fewer", num_images=2)
    run(job)
    assert events(world / "fewer", "notice")[-1]["message"].startswith(
        "2 points of other settings or images set aside"
    )
    run(toy_job(world, "fewer"))
    assert "2 points of these settings brought back" in events(world / "fewer", "notice")[-1]["message"]
    assert numbers(world / "fewer") == before


def test_a_run_that_goes_on_has_metrics_of_what_all_points_share(world: Path) -> None:
    job = toy_job(world, "half", keep_features=True)
    run(job)
    (world / "half" / "metrics.json").unlink()
    shutil.rmtree(job.layout.score(job.points[1], 1))
    shutil.rmtree(job.layout.judged(job.points[1], 1) / "images-00001")
    found = partial_metrics(job.config)
    assert found["images"] == {"1": [0, 1]}
    assert found["simulated"], "its judges are those of the phantom"
    assert "2 images of subject 1 at all of them" in found["partial"]
    alone = run(toy_job(world, "half"))
    for point in found["points"]:
        assert set(point["metrics"]) >= {"pixcorr", "mixer", "depthwise"}
        assert point["metrics"]["pixcorr"]["n"] == 2
    assert [p["kappa"] for p in found["points"]] == [p["kappa"] for p in alone["points"]]
    page = write_report(world / "half", partial=found)
    assert (page.name, "Not finished: 2 of" in page.read_text()) == ("report.partial.html", True)


def test_another_protocol_makes_no_picture_again(world: Path) -> None:
    shutil.copytree(world / "run", world / "protocol")
    metrics = run(toy_job(world, "protocol", protocol="takagi"))
    assert metrics["protocol"] == "takagi"
    assert any("982" in line for line in metrics["departures"])
    assert pictures(world / "protocol") == pictures(world / "run")
    assert not events(world / "protocol", "results_of_other_settings")


def test_a_sweep_adds_its_points_to_those_of_the_evaluation(world: Path) -> None:
    job = toy_job(world, "sweep")
    config = job.config.model_copy(
        update={"sweep": job.config.sweep.model_copy(update={"kappa": (10.0,), "eta": (0.5, 1.0)})}
    )
    sweep = dataclasses.replace(job, config=config, points=grid_points(config))
    run(job)
    alone = numbers(world / "sweep")["points"]
    run(sweep)
    points = numbers(world / "sweep")["points"]
    assert [(p["kappa"], p["eta"]) for p in points] == [(0, 0), (10, 0.5), (10, 1)]
    assert points[:2] == alone
    run(job)
    assert numbers(world / "sweep")["points"] == points


def test_other_guidance_terms_make_other_pictures_from_the_targets_that_they_name(world: Path) -> None:
    made = {}
    for guidance in ({"clip": 1.0}, {"latent": 1.0}, {"clip": 0.5, "pixels": 2.0}):
        job = toy_job(world, f"guided-{len(made)}", num_images=1, baseline=False)
        sampler = job.config.sampler.model_copy(update={"guidance": guidance, "kappa": 50.0})
        job = dataclasses.replace(job, config=job.config.model_copy(update={"sampler": sampler}))
        run(dataclasses.replace(job, points=(Point(50.0, 0.5),)))
        made[str(guidance)] = tuple(pictures(job.config.run_dir).values())
    assert len(set(made.values())) == 3


def test_more_repeats_keep_those_that_are_there_and_fewer_take_the_first(world: Path) -> None:
    shutil.copytree(world / "run", world / "repeats")
    before = pictures(world / "run")
    metrics = run(toy_job(world, "repeats", num_repeats=3))
    after = pictures(world / "repeats")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 * TEST_IMAGES
    folder = world / "repeats" / metrics["points"][0]["folder"] / "image-00001"
    assert len(read_record(folder)["noise_seeds"]) == len(read_record(folder)["files"]) == 3
    assert metrics["points"][0]["metrics"] != numbers(world / "run")["points"][0]["metrics"]
    run(toy_job(world, "repeats"))
    assert numbers(world / "repeats") == numbers(world / "run")
    assert pictures(world / "repeats") == after


def test_pictures_that_other_versions_began_are_told(world: Path) -> None:
    shutil.copytree(world / "run", world / "versions")
    path = world / "versions" / "reconstructions" / "unguided" / "subj01" / "settings.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "made_with": {"device": "A200", "torch": "1.0"}}))
    run(toy_job(world, "versions"))
    assert "1 point(s) were begun with A200, 1.0;" in events(world / "versions", "notice")[-1]["message"]
    assert numbers(world / "versions") == numbers(world / "run")


def test_named_groups_have_means_over_subjects(world: Path) -> None:
    job = toy_job(world, "groups", subjects=(1, 2), baseline=False)
    metrics = run(dataclasses.replace(job, image_groups={"two": (0, 3)}))
    parts = [entry["groups"]["two"]["ssim"]["value"] for entry in metrics["points"]]
    (mean,) = (entry["groups"]["two"]["ssim"] for entry in metrics["averages"])
    assert (mean["value"], mean["n"], mean["ci_low"]) == (pytest.approx(sum(parts) / 2), 2, None)
    assert "Mean of subjects 1, 2: two (2 images)" in write_report(world / "groups").read_text()


def test_only_some_pictures_stay_where_the_recipe_says_so_and_no_features(world: Path) -> None:
    metrics = run(toy_job(world, "few", keep_pictures=1))
    assert metrics["points"] == numbers(world / "run")["points"]
    assert len(pictures(world / "few")) == TEST_IMAGES + 2 * 2
    assert not list((world / "few" / "evaluation" / "judged" / "nd").glob("[!o]*/*/*/features.safetensors"))
    assert write_report(world / "few").exists()
    assert run(toy_job(world, "few", keep_pictures=1)) == metrics


def test_ground_truth_embeddings_need_no_decoder(world: Path) -> None:
    job = toy_job(world, "ceiling", embeddings="ground_truth", num_images=3)
    metrics = run(dataclasses.replace(job, decoder_dir=world / "nothing"))
    assert metrics["provenance"]["decoding"] == {"embeddings": "ground_truth", "split": "test"}
    assert metrics["points"][0]["metrics"]["pixcorr"]["n"] == 3
    with pytest.raises(CheckpointError, match="no trained decoder"):
        run(dataclasses.replace(toy_job(world, "nothing"), decoder_dir=world / "nothing"))


def test_training_images_for_choosing_a_point_stay_apart_from_test_images(world: Path) -> None:
    job = dataclasses.replace(toy_job(world, "choose"), split="train", points=(Point(10.0, 0.5),))
    run(job)
    assert not (world / "choose" / "metrics.json").exists()
    assert numbers(world / "choose" / "selection")["split"] == "train"


@pytest.fixture(scope="module")
def slow(world: Path) -> Path:
    """The run folder of an uninterrupted evaluation that takes long enough to be interrupted."""
    run(toy_job(world, "slow", num_steps=SLOW))
    return world / "slow"


@pytest.mark.launch
def test_another_rank_finishes_the_unit_of_a_killed_one_and_says_so(world: Path, slow: Path) -> None:
    processes = [_start(world, "killed", SLOW, rank=(str(rank), "2")) for rank in range(2)]
    victim = int(wait_until(lambda: _owner_of_a_reconstruction(world / "killed"), pause_s=0.005)["pid"])
    os.kill(victim, signal.SIGKILL)
    codes = {process.pid: process.wait(timeout=HANG_S) for process in processes}
    assert sorted(codes.values()) == [-signal.SIGKILL, 0]
    assert numbers(world / "killed") == numbers(slow)
    assert pictures(world / "killed") == pictures(slow)
    survivor = [process.pid for process in processes].index(victim) ^ 1
    assert [event["dead"]["pid"] for event in events(world / "killed", "unit_taken_over", survivor)] == [victim]


@pytest.mark.launch
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun (pip install mpich)")
def test_several_mpi_ranks_get_the_same_numbers_as_one(world: Path) -> None:
    assert MPIRUN is not None
    assert _start(world, "mpi", 4, [MPIRUN, "-n", "3"]).wait(timeout=HANG_S) == 0
    assert numbers(world / "mpi") == numbers(world / "run")
    assert pictures(world / "mpi") == pictures(world / "run")
    assert all(events(world / "mpi", "evaluation_done", rank) for rank in range(3))


@pytest.mark.slow
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun (pip install mpich)")
def test_an_mpi_job_that_died_with_one_of_its_ranks_is_finished_by_the_next(world: Path, slow: Path) -> None:
    assert MPIRUN is not None
    job = _start(world, "died", SLOW, [MPIRUN, "-n", "2"])
    victim = wait_until(lambda: _owner_of_a_reconstruction(world / "died"), pause_s=0.005)
    os.kill(int(victim["pid"]), signal.SIGKILL)
    assert job.wait(timeout=HANG_S) != 0
    assert not (world / "died" / "metrics.json").exists()
    run(toy_job(world, "died", num_steps=SLOW))
    assert numbers(world / "died") == numbers(slow)
    assert pictures(world / "died") == pictures(slow)


def _start(
    world: Path, run_name: str, num_steps: int, launcher: Sequence[str] = (), rank: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "tests.nd_dist.evaluation.eval_rank"]
    words = [*launcher, *program, str(world), run_name, str(num_steps), *rank]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _owner_of_a_reconstruction(run_dir: Path) -> dict[str, Any]:
    """Return who holds a group of units, empty where nobody does."""
    for path in (run_dir / "evaluation" / "leases").glob("*/reconstruct/*_subj01_*.0000"):
        if (text := path.read_text()) and not path.with_suffix(".done").exists():
            owner: dict[str, Any] = json.loads(text)
            return owner
    return {}


def test_a_subject_without_images_is_an_error(world: Path) -> None:
    job = dataclasses.replace(toy_job(world, "empty"), source=ToySource(test_images=0))
    with pytest.raises(DataError, match="no test images"):
        run(job)
