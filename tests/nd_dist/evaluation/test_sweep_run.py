"""Sweeps on toy networks: shared steps, controls, the choice on training images, the estimate, and joined runs."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nd_dist.comm import Comm
from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.merge import merge_runs
from nd_dist.evaluation.points.units import Point, config_points, control_points, grid_points
from nd_dist.evaluation.reconstruction.controls import shuffled_images
from nd_dist.evaluation.run import evaluate, sweep
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.fanout.results import read_png, read_record
from nd_dist.report.report import write_report
from tests.nd_dist.evaluation.toy_world import TEST_IMAGES, toy_job, write_models


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    return folder


def run(job: Job) -> dict[str, Any]:
    return evaluate(job, Comm(), EventLog(job.config.run_dir, 0, "evaluate"))


def with_sweep(job: Job, **values: Any) -> Job:
    config = job.config.model_copy(update={"sweep": job.config.sweep.model_copy(update=values)})
    return dataclasses.replace(job, config=config, points=grid_points(config))


def run_sweep(job: Job, only_estimate: bool = False, **heldout: Any) -> dict[str, Any]:
    search = dataclasses.replace(job, split="train", **heldout)
    events = EventLog(job.config.run_dir, 0, "sweep")
    return sweep(search, job, Comm(), events, only_estimate=only_estimate)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(events_path(run_dir, 0)) if event["event"] == name]


def pictures(run_dir: Path, point: Point) -> dict[str, bytes]:
    folder = run_dir / "reconstructions" / point.name
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_points_that_share_their_guided_steps_are_the_same_bits_as_alone(world: Path) -> None:
    points = tuple(Point(10.0, eta) for eta in (0.0, 0.35, 0.45, 0.7, 1.0))
    run(dataclasses.replace(toy_job(world, "together", num_steps=8, num_images=2), points=points))
    for point in points:
        run(dataclasses.replace(toy_job(world, "alone", num_steps=8, num_images=2), points=(point,)))
        assert pictures(world / "together", point) == pictures(world / "alone", point)
    different = {tuple(pictures(world / "together", point).values()) for point in points}
    assert len(different) == 4, ".35 and .45 are both 2 steps of 6"


def test_a_family_with_one_point_missing_makes_that_one_only(world: Path) -> None:
    points = tuple(Point(10.0, eta) for eta in (0.3, 1.0))
    job = dataclasses.replace(toy_job(world, "gap", num_steps=8), points=points)
    before = run(job)
    shutil.rmtree(world / "gap" / "reconstructions" / points[0].name / "subj01" / "image-00001")
    kept = (world / "gap" / "reconstructions" / points[1].name / "subj01" / "image-00001" / "repeat-0.png").stat()
    (world / "gap" / "metrics.json").unlink()
    shutil.rmtree(world / "gap" / "evaluation" / "scores")
    assert run(job)["points"] == before["points"]
    again = (world / "gap" / "reconstructions" / points[1].name / "subj01" / "image-00001" / "repeat-0.png").stat()
    assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


@pytest.fixture(scope="module")
def controlled(world: Path) -> Job:
    """An evaluation with all controls."""
    job = toy_job(world, "controls", controls=True)
    job = dataclasses.replace(job, points=(*config_points(job.config), *control_points(job.config)))
    run(job)
    return job


def test_controls_stand_apart_from_points_with_metrics_of_their_own(controlled: Job) -> None:
    metrics = json.loads((controlled.config.run_dir / "metrics.json").read_text())
    assert len(metrics["points"]) == 2
    found = {entry["control"]: entry["metrics"] for entry in metrics["controls"]}
    assert set(found) == {"shuffled", "nearest", "ceiling"}
    assert "repeat_pixcorr" not in found["nearest"], "copies agree by construction"
    assert "image_retrieval" not in found["shuffled"], "no reconstruction is involved in retrieval"
    tested = [entry for entry in metrics["comparisons"] if "control" in entry]
    assert {entry["against"] for entry in tested} == {"the recipe's point"}
    assert {entry["control"] for entry in tested} == set(found)


def test_shuffled_inputs_give_another_images_targets_with_the_images_own_noise(controlled: Job) -> None:
    layout, point = controlled.layout, Point(10.0, 0.5)
    shuffled = dataclasses.replace(point, control="shuffled")
    source_of = shuffled_images(range(TEST_IMAGES), controlled.config.seed)
    own = read_record(layout.pictures_of(point, 1, 0))
    control = read_record(layout.pictures_of(shuffled, 1, 0))
    assert control["noise_seeds"] == own["noise_seeds"]
    assert control["files"] != own["files"]
    assert control["files"] != read_record(layout.pictures_of(point, 1, source_of[0]))["files"]


def test_the_nearest_control_is_a_training_picture(controlled: Job) -> None:
    point = Point(0.0, 0.0, control="nearest")
    for image_id in range(TEST_IMAGES):
        folder = controlled.layout.pictures_of(point, 1, image_id)
        chosen = read_record(folder)["nearest"]
        assert chosen in controlled.source.images(1, "train")
        assert (read_png(folder / "repeat-1.png") == controlled.source.pictures([chosen])[0]).all()


def test_the_ceiling_control_is_an_evaluation_of_ground_truth_embeddings(world: Path, controlled: Job) -> None:
    job = toy_job(world, "true", embeddings="ground_truth", baseline=False)
    expected = run(job)["points"][0]["metrics"]
    metrics = json.loads((controlled.config.run_dir / "metrics.json").read_text())
    found = next(entry for entry in metrics["controls"] if entry["control"] == "ceiling")
    assert found["metrics"] == expected


@pytest.fixture(scope="module")
def swept(world: Path) -> Job:
    """A sweep over two kappas, two etas and two seeds."""
    job = with_sweep(
        toy_job(world, "swept", num_images=2), kappa=(5.0, 10.0), eta=(0.5, 1.0), seed=(3, 4), num_images=3
    )
    run_sweep(job)
    return job


def test_a_sweep_reports_every_point_and_records_how_one_was_chosen(swept: Job) -> None:
    metrics = json.loads((swept.config.run_dir / "metrics.json").read_text())
    assert len(metrics["points"]) == 2 * (1 + 4)
    assert {json.dumps(entry.get("settings", {})) for entry in metrics["points"]} == {"{}", '{"seed": 4}'}
    selection = metrics["selection"]
    assert selection["metric"] == "pixcorr"
    assert len(selection["candidates"]) == 1 + 4, "seeds are averaged over"
    assert set(selection["images"]["1"]) <= set(range(50, 60)), "training images"
    assert len(selection["images"]["1"]) == 3
    assert selection["heldout"] is False
    best = max(selection["candidates"], key=lambda item: item["value"])
    assert selection["chosen"] == best
    assert events(swept.config.run_dir, "point_chosen")


def test_another_seed_makes_other_pictures_and_is_reproduced_by_a_run_of_that_seed(world: Path, swept: Job) -> None:
    other = toy_job(world, "seed-4", baseline=False, num_images=2)
    other = dataclasses.replace(other, config=other.config.model_copy(update={"seed": 4}))
    run(other)
    point = Point(10.0, 0.5)
    with_seed = dataclasses.replace(point, settings=(("seed", 4),))
    assert pictures(world / "seed-4", point) == pictures(swept.config.run_dir, with_seed)
    assert pictures(world / "seed-4", point) != pictures(swept.config.run_dir, point)


def test_an_evaluation_afterwards_keeps_the_choice_and_the_points(swept: Job) -> None:
    before = (swept.config.run_dir / "metrics.json").read_text()
    run(dataclasses.replace(swept, points=(Point(0.0, 0.0), Point(10.0, 0.5))))
    assert (swept.config.run_dir / "metrics.json").read_text() == before


def test_only_the_chosen_point_is_reported_where_the_recipe_says_so(world: Path) -> None:
    job = with_sweep(toy_job(world, "chosen"), kappa=(5.0, 10.0), eta=(0.5,), num_images=2, report="chosen")
    metrics = run_sweep(job, heldout={1: [51, 52, 53]})
    chosen = Point.of(metrics["selection"]["chosen"])
    assert {(entry["kappa"], entry["eta"]) for entry in metrics["points"]} == {(0.0, 0.0), (chosen.kappa, chosen.eta)}
    assert metrics["selection"]["heldout"] is True
    assert set(metrics["selection"]["images"]["1"]) <= {51, 52, 53}


def test_the_estimate_stops_before_the_sweep_and_what_it_made_counts(world: Path) -> None:
    job = with_sweep(toy_job(world, "estimate"), kappa=(5.0,), eta=(0.5, 1.0), num_images=4)
    assert run_sweep(job, only_estimate=True) == {}
    assert not (world / "estimate" / "metrics.json").exists()
    (told,) = events(world / "estimate", "estimate")
    assert told["units"] == 2 * 4, "all four training images were timed, in each of two families"
    assert told["gpu_hours"] > 0
    assert events(world / "estimate", "notice")[-1]["message"].startswith(f"disk: {3 * TEST_IMAGES * 3:,} files and")
    run_sweep(job)
    made = events(world / "estimate", "evaluation_done")[-1]["work"]
    assert made["calibrate" if "calibrate" in made else "selection: calibrate"]["done"] == 0
    assert len(events(world / "estimate", "estimate")) == 2


def test_progress_says_how_much_time_is_left(swept: Job) -> None:
    told = [event for event in events(swept.config.run_dir, "progress") if event["task"] == "reconstruct"]
    assert told[-1]["left_s"] == 0.0


def test_two_sweeps_join_into_one_table_with_what_sets_them_apart(world: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed, kappas in (("one", 3, (5.0,)), ("two", 3, (5.0, 10.0)), ("three", 4, (5.0,))):
        job = with_sweep(toy_job(world, f"join-{name}", num_images=2), kappa=kappas, eta=(1.0,), select="")
        job = dataclasses.replace(job, config=job.config.model_copy(update={"seed": seed}))
        run_sweep(job)
        runs.append(job.config.run_dir)
    assert merge_runs(tmp_path / "joined", runs) == 3 + 2
    metrics = json.loads((tmp_path / "joined" / "metrics.json").read_text())
    points = [(Point.of(entry).name, entry["metrics"]["pixcorr"]["value"]) for entry in metrics["points"]]
    assert [name for name, _ in points] == [
        "unguided", "kappa-5_eta-1", "kappa-10_eta-1", "unguided_seed-4", "kappa-5_eta-1_seed-4",
    ]  # fmt: skip
    alone = json.loads((runs[2] / "metrics.json").read_text())["points"]
    assert [value for _, value in points[3:]] == [entry["metrics"]["pixcorr"]["value"] for entry in alone]
    assert len(metrics["provenance"]["merged"]) == 3
    assert write_report(tmp_path / "joined").exists()
    with pytest.raises(DataError, match="holds metrics already"):
        merge_runs(tmp_path / "joined", runs)


def test_runs_of_different_protocols_do_not_join(world: Path, tmp_path: Path) -> None:
    runs = []
    for protocol in ("nd", "takagi"):
        job = toy_job(world, f"protocol-{protocol}", protocol=protocol, baseline=False, num_images=2)
        run(job)
        runs.append(job.config.run_dir)
    with pytest.raises(DataError, match="protocol"):
        merge_runs(tmp_path / "joined", runs)


@pytest.mark.launch
def test_points_that_are_clearly_worse_stop_early_and_the_best_is_the_same(world: Path) -> None:
    settings = {"kappa": (5.0, 10.0), "eta": (0.5, 1.0), "num_images": 10, "report": "chosen"}
    whole = run_sweep(with_sweep(toy_job(world, "whole", num_images=2), **settings))["selection"]
    job = with_sweep(toy_job(world, "halved", num_images=2), **settings, halving=True)
    halved = run_sweep(job)["selection"]
    assert [event["left"] for event in events(job.config.run_dir, "points_stopped")] == [3, 2]
    values = {Point.of(item): item["value"] for item in whole["candidates"]}
    assert len(halved["candidates"]) == 2
    assert all(values[Point.of(item)] == item["value"] for item in halved["candidates"])
    assert run_sweep(job)["selection"] == halved
    work = events(job.config.run_dir, "evaluation_done")[-1]["work"]
    assert sum(tally["done"] for tally in work.values()) == 0


def test_test_images_can_be_named_and_a_strange_one_is_refused(world: Path) -> None:
    job = toy_job(world, "named", image_ids=(3, 1), baseline=False)
    assert run(job)["images"] == {"1": [1, 3]}
    with pytest.raises(ConfigError, match="70"):
        run(toy_job(world, "named", image_ids=(1, 70)))


def test_a_guided_point_without_a_guided_step_is_told(world: Path) -> None:
    job = dataclasses.replace(toy_job(world, "none", num_images=1), points=(Point(10.0, 0.1), Point(10.0, 0.5)))
    run(job)
    assert "no step is guided at kappa-10_eta-0.1: eta" in events(job.config.run_dir, "notice")[-1]["message"]
