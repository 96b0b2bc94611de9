"""Whether an evaluation tells retrieving from reconstructing: on a toy evaluation, and on the phantom's pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from nd_dist.comm import Comm
from nd_dist.errors import DataError
from nd_dist.evaluation.generalisation import TRAINED
from nd_dist.evaluation.points.units import Point, config_points
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.frozen.folders import resolve_folder
from nd_dist.frozen.phantom_judges import JudgeNetwork
from nd_dist.metrics.generalisation import ALL, NEARER, SEEN_TO_TRAINED, TO_SEEN, TO_TRAINED, similarities
from nd_dist.pixels import pictures_to_pixels
from nd_dist.report.findings import Findings
from nd_dist.report.generalisation import generalisation_tables, split_table
from nd_dist.report.report import write_report
from shards.phantom.pictures import PictureWorld
from tests.nd_dist.evaluation.toy_world import ToySource, toy_job, write_models

GROUPS = {"low": (0, 1), "not there": (77,)}


def run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Evaluate the toy world without guidance, with the nearest training picture as a control."""
    job = toy_job(folder, name, num_images=None)
    points = (config_points(job.config)[0], Point(0.0, 0.0, control="nearest"))
    job = dataclasses.replace(job, **{"points": points, "image_groups": GROUPS, **changes})
    return evaluate(job, Comm(), EventLog(job.config.run_dir, 0, "evaluate"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    for name in ("base", "other"):
        run(folder, name, source=ToySource(test_images=12))
    return folder


def entries(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["points"][0]["generalisation"], metrics["controls"][0]["generalisation"]


def test_the_nearest_training_picture_is_found_out_as_retrieved(world: Path) -> None:
    of_point, of_nearest = entries(world / "base")
    retrieved = of_nearest["retrieval"][ALL]
    assert retrieved[NEARER]["value"] == 0
    assert retrieved[TO_TRAINED]["value"] == pytest.approx(1, abs=1e-5)
    assert of_point["retrieval"][ALL][SEEN_TO_TRAINED] == retrieved[SEEN_TO_TRAINED]
    assert of_point["judge"] == "mixer"
    assert of_point["retrieval"][ALL][TO_SEEN]["n"] == 12
    assert of_point["retrieval"][ALL][TO_SEEN]["ci_low"] < of_point["retrieval"][ALL][TO_SEEN]["ci_high"]


def test_groups_are_compared_with_the_other_images_and_dimensions_with_the_true_ones(world: Path) -> None:
    found, _ = entries(world / "base")
    assert list(found["drop"]) == ["low"]
    assert set(found["retrieval"]) == {ALL, "low"}
    assert set(found["among_all"]) == {"low"}
    assert set(found["among_all"]["low"]) == {"plain_early", "plain_late", "residual", "mixer"}
    assert found["retrieval"]["low"][NEARER]["n"] == 2
    assert found["dimension"]["n"] == 12
    assert 1 <= found["dimension"]["decoded"] < 12
    assert 1 <= found["dimension"]["true"] < 12


def test_the_report_shows_it_and_a_run_without_groups_has_nothing_of_it(world: Path) -> None:
    page = write_report(world / "base").read_text()
    assert "Reconstructed, or retrieved?" in page
    tables = generalisation_tables(Findings(world / "base"))
    assert [table.title.partition(",")[0] for table in tables] == [
        ALL,
        "groups",
        "two-way identification among a group's own images and among all",
        "groups minus all other images",
    ]
    assert [metric.label for metric in tables[2].metrics][:2] == ["Plain, early, own", "Plain, early, all"]
    plain = run(world, "plain", image_groups={})
    assert not any("generalisation" in entry for entry in [*plain["points"], *plain["controls"]])
    assert not (world / "plain/evaluation/trained").exists()
    assert "Reconstructed, or retrieved?" not in write_report(world / "plain").read_text()


def test_without_training_pictures_the_rest_is_there(world: Path) -> None:
    points = tuple(config_points(toy_job(world).config)[:1])
    found = run(world, "no pictures", absent={TRAINED: "not packed"}, points=points)["points"][0]["generalisation"]
    assert set(found) == {"among_all", "drop", "dimension"}


def test_runs_of_several_splits_stand_under_each_other_with_their_differences(world: Path) -> None:
    table = split_table([world / "base", world / "other"])
    assert [row.kind for row in table.rows] == ["main", "main", "difference"]
    assert {value for value, _, _ in table.rows[2].cells} <= {"", "+.000", "+0.0"}
    metrics = world / "other" / "metrics.json"
    content = json.loads(metrics.read_text())
    fewer = {**content, "provenance": {**content["provenance"], "bootstrap": 200}}
    for changed in ({**content, "protocol": "paper"}, fewer):
        metrics.write_text(json.dumps(changed))
        with pytest.raises(DataError, match="different protocols, or with different numbers of resamples"):
            split_table([world / "base", world / "other"])
    metrics.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["combination", "object"])
def test_on_the_phantom_a_decoder_that_generalises_is_told_from_one_that_retrieves(kind: str) -> None:
    phantom_world = PictureWorld(seed=5, num_images=160, num_shared=48)
    shown = [i for i in phantom_world.shared_ids if phantom_world.scene(i).held_out == kind][:12]
    trained = [i for i in range(phantom_world.num_images) if i not in phantom_world.shared_ids]
    judge = JudgeNetwork.load(resolve_folder("phantom/judges") / "mixer")

    def features(pictures: list[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return judge.features(pictures_to_pixels(np.stack(pictures))).late.flatten(1).numpy()

    seen_ND, trained_TD = (features([phantom_world.picture(i) for i in ids]) for ids in (shown, trained))
    blurred = [Image.fromarray(phantom_world.picture(i)).filter(ImageFilter.GaussianBlur(1)) for i in shown]
    generalises_ND = features([np.asarray(picture) for picture in blurred])
    retrieves_ND = trained_TD[np.corrcoef(seen_ND, trained_TD)[: len(shown), len(shown) :].argmax(axis=1)]
    decoder = similarities([generalises_ND], seen_ND, trained_TD)
    retriever = similarities([retrieves_ND], seen_ND, trained_TD)
    assert decoder[NEARER].mean() > 0.8
    assert retriever[NEARER].mean() == 0
    assert decoder[TO_SEEN].mean() > decoder[TO_TRAINED].mean()
    assert retriever[TO_SEEN].mean() < retriever[TO_TRAINED].mean()
