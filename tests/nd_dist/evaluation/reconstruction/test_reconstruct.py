from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from nd_dist.comm import Comm
from nd_dist.config import Config
from nd_dist.diffusion.finite import NonFiniteSample
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.reconstruction.decode import TrueTargets
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.reconstruction.reconstruct import Reconstruction, Result, reconstruct
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.fanout.results import read_png, read_record
from tests.nd_dist.evaluation.toy_world import ToySource, toy_config, toy_job, write_models
from tests.nd_dist.frozen.toy_folders import PICTURE_SIZE

IMAGE = 1
POINTS = (Point(0.0, 0.0), Point(10.0, 0.5), Point(10.0, 0.25))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    return folder


class SpoiledSource(ToySource):
    """A source whose guidance targets of one image are not finite."""

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        found = super().targets(name, image_ids)
        if name == "g02":
            found[np.asarray(image_ids) == IMAGE] = np.inf
        return found


def config_of(world: Path, **sampler: Any) -> Config:
    config = toy_config(world, num_steps=6)
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=sampler)})


def reconstructed(
    world: Path, out_dir: Path, source: ToySource, points: Sequence[Point], **sampler: Any
) -> list[Path]:
    config = config_of(world, **sampler)
    results = [Result(point, out_dir / str(index), "print") for index, point in enumerate(points)]
    networks = Networks(config, torch.device("cpu"))
    for made in reconstruct([IMAGE], {IMAGE: results}, config, networks.sampler(config), TrueTargets(source)):
        made.publish(config.sampler)
    return [result.folder for result in results]


def test_a_sample_that_is_not_finite_stops_the_run_by_default(world: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteSample, match="target g02") as caught:
        reconstructed(world, tmp_path, SpoiledSource(), POINTS)
    assert "image 1, repeat 0" in caught.value.where
    assert not any((tmp_path / str(index)).exists() for index in range(3))


def test_reported_samples_are_grey_pictures_and_on_record_and_the_others_are_made(world: Path, tmp_path: Path) -> None:
    spoiled, whole = (
        reconstructed(world, tmp_path / name, source, POINTS, on_non_finite="report")
        for name, source in (("spoiled", SpoiledSource()), ("whole", ToySource()))
    )
    for folder in spoiled[1:]:
        failures = [{"repeat": repeat, "what": "target g02", "timestep": -1} for repeat in range(2)]
        assert read_record(folder)["failures"] == failures
        assert np.unique(read_png(folder / "repeat-0.png")).tolist() == [128]
    assert read_record(whole[1])["failures"] == []
    assert read_record(spoiled[0])["failures"] == [], "the point without guidance uses no guidance target"
    assert np.array_equal(read_png(spoiled[0] / "repeat-1.png"), read_png(whole[0] / "repeat-1.png"))


@pytest.mark.parametrize("kind", ["strip", "gif"])
def test_intermediate_pictures_lie_beside_the_reconstructions_of_every_point(
    world: Path, tmp_path: Path, kind: str
) -> None:
    folders = reconstructed(world, tmp_path, ToySource(), POINTS, intermediates=kind)
    for folder in folders:
        last = read_png(folder / "repeat-1.png")
        if kind == "strip":
            strip = read_png(folder / "steps.png")
            assert strip.shape == (2 * PICTURE_SIZE, 4 * PICTURE_SIZE, 3)
            assert np.array_equal(strip[PICTURE_SIZE:, 3 * PICTURE_SIZE :], last)
        else:
            with Image.open(folder / "steps-1.gif") as animation:
                assert getattr(animation, "n_frames", 1) == 4
    plain = reconstructed(world, tmp_path / "plain", ToySource(), POINTS)
    assert all(
        (folder / "repeat-0.png").read_bytes() == (other / "repeat-0.png").read_bytes()
        for folder, other in zip(folders, plain, strict=True)
    )
    assert not list((tmp_path / "plain").rglob("steps*"))


def test_an_image_comes_to_the_same_bits_whatever_stands_at_the_other_places(world: Path) -> None:
    config, source = config_of(world, on_non_finite="report"), SpoiledSource()
    sampler = Networks(config, torch.device("cpu")).sampler(config)

    def made(places: list[int]) -> list[Reconstruction]:
        results = {image: [Result(point, Path(str(image)), "print") for point in POINTS] for image in (2, 3)}
        return reconstruct(places, results, config, sampler, TrueTargets(source))

    spoiled, whole = made([IMAGE, 2, 3]), made([0, 2, 3])
    assert len(spoiled) == 2 * len(POINTS)
    for one, other in zip(spoiled, whole, strict=True):
        assert torch.equal(one.images_RCHW, other.images_RCHW)
        assert (one.facts, one.failed) == (other.facts, ())
        assert one.images_RCHW.shape[0] == config.evaluation.num_repeats


def test_the_metrics_file_names_reconstructions_that_were_not_finite(world: Path) -> None:
    config, quick = config_of(world, on_non_finite="report"), {"num_repeats": 1, "embeddings": "ground_truth"}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=quick)})
    job = toy_job(world)
    job = replace(job, config=config, source=SpoiledSource(), networks=Networks(config, torch.device("cpu")))
    metrics = evaluate(job, Comm(), EventLog(config.run_dir, 0, "evaluate"))
    unguided, guided = metrics["points"]
    assert "failures" not in unguided
    assert guided["failures"] == [{"image_id": IMAGE, "repeat": 0, "what": "target g02", "timestep": -1}]
    assert guided["metrics"]["pixcorr"]["n"] == unguided["metrics"]["pixcorr"]["n"]
