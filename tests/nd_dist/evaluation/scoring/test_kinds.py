"""Kind in decoded captions and in pictures: probes of training pictures, in a whole evaluation of a toy world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nd_dist.comm import Comm
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.files import read_json
from nd_dist.schema import SEMANTIC
from tests.nd_dist.evaluation.toy_world import ToySource, toy_job, write_models

CLASSES = {"even": tuple(range(0, 200, 2)), "odd": tuple(range(1, 200, 2))}


class SourceOfTwoKinds(ToySource):
    """Captions and pictures of even and odd images differ."""

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        found = super().targets(name, image_ids)
        if name == SEMANTIC:
            found[:, 0, 0] = [20.0 if image_id % 2 else -20.0 for image_id in image_ids]
        return found

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        return np.stack([np.full((32, 32, 3), 220 if image_id % 2 else 30, dtype=np.uint8) for image_id in image_ids])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_models(folder)
    return folder


def test_true_captions_have_the_kind_and_shuffled_ones_have_another_pictures(world: Path) -> None:
    points = tuple(Point(10.0, 0.5, control=control) for control in ("none", "ceiling", "shuffled"))
    job = toy_job(world, "kinds", subjects=[1])
    job = replace(job, points=points, source=SourceOfTwoKinds(), image_classes=CLASSES)
    evaluate(job, Comm(), EventLog(world / "kinds", 0, "evaluate"))
    content = read_json(job.layout.metrics)
    rows = {entry.get("control", "none"): entry["metrics"] for entry in [*content["points"], *content["controls"]]}
    assert rows["ceiling"]["kind"]["value"] == 1.0
    assert set(rows["none"]) >= {"kind", "kind_seen"}
    assert 0 <= rows["none"]["kind_seen"]["value"] <= 1
    assert rows["shuffled"]["kind"]["value"] != rows["ceiling"]["kind"]["value"]


def test_the_nearest_training_picture_is_seen_and_nothing_is_decoded_for_it(world: Path) -> None:
    job = toy_job(world, "nearest", subjects=[1])
    points = (Point(10.0, 0.5), Point(0.0, 0.0, control="nearest"))
    evaluate(
        replace(job, points=points, source=SourceOfTwoKinds(), image_classes=CLASSES),
        Comm(),
        EventLog(world / "nearest", 0, "evaluate"),
    )
    (nearest,) = read_json(job.layout.metrics)["controls"]
    assert "kind" not in nearest["metrics"]
    assert nearest["metrics"]["kind_seen"]["value"] in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_without_classes_nothing_is_said_of_kinds(world: Path) -> None:
    job = toy_job(world, "none", subjects=[1])
    evaluate(job, Comm(), EventLog(world / "none", 0, "evaluate"))
    (entry, *_) = read_json(job.layout.metrics)["points"]
    assert not {"kind", "kind_seen"} & set(entry["metrics"])
