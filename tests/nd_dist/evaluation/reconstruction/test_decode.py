"""Predictions on disk: fixed batches, row reads, statistics that standardise z."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nd_dist.errors import ConfigError
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.decoding import decode_tasks, statistics_tasks
from nd_dist.evaluation.job import Keys
from nd_dist.evaluation.points.units import Point
from nd_dist.evaluation.reconstruction.decode import (
    BATCH,
    DecoderFolder,
    Moments,
    StoredTargets,
    Summary,
    TrueTargets,
    prediction_seeds,
)
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from tests.nd_dist.evaluation.toy_world import NUM_VOXELS, SHAPES, ToySource, toy_config, toy_job

NUM = BATCH + 7
IDS = list(range(NUM))


class SemanticSource(ToySource):
    """The toy source with c in the shape that ``LinearPredictor`` makes, and more training images than a batch."""

    def images(self, subject: int, split: str) -> list[int]:
        return super().images(subject, split) if split == "test" else list(range(50, 50 + NUM))

    def targets(self, name: str, image_ids: Sequence[int]) -> np.ndarray:
        values = super().targets(name, image_ids)
        return values[:, :2, :3] if name == "c" else values


class LinearPredictor:
    """Predicts c and z as linear functions of the voxels, and remembers what it was asked for."""

    names = ("c", "z")

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def predict(
        self, name: str, subject: int, voxels_BV: npt.NDArray[np.float32], seeds: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        self.asked.append((name, len(seeds)))
        if name == "c":
            return voxels_BV[:, :6].reshape(-1, 2, 3)
        z = 3.0 + 2.0 * voxels_BV[:, :16].reshape(-1, 1, 4, 4)
        return np.tile(z, (1, 4, 2, 2)).astype(np.float32)


class OnlyDecoder:
    """Networks of an evaluation that only decodes."""

    def __init__(self, predictor: LinearPredictor) -> None:
        self._predictor = predictor

    def decoder(self, _folder: Path) -> LinearPredictor:
        return self._predictor


def decoded(
    folder: Path, rule: str, calibrated: tuple[str, ...] = ("initial",), by: str = "element"
) -> tuple[StoredTargets, list]:
    predictor = LinearPredictor()
    job = toy_job(folder, z_calibration=rule, calibrated=calibrated, calibrated_by=by)
    job = replace(job, source=SemanticSource(NUM), networks=OnlyDecoder(predictor))  # type: ignore[arg-type]
    bench = Bench(job, Keys({"": {"decoding": rule, "shards": "toy"}}, {}))
    for task in (*decode_tasks(bench), *statistics_tasks(bench)):
        list(task.work())
        assert task.is_done()
    return StoredTargets(job.layout.decoded(Point(0.0, 0.0), 1), IDS), predictor.asked


def test_stored_rows_are_the_predictions_in_any_order(tmp_path: Path) -> None:
    source, ids = ToySource(NUM), [NUM - 1, 0, BATCH]
    stored, asked = decoded(tmp_path, "none")
    voxels = source.voxels(1, ids)
    assert stored.names == ("c", "z")
    for name in stored.names:
        assert (stored.rows(name, ids) == LinearPredictor().predict(name, 1, voxels, [0, 0, 0])).all()
    assert asked == [("c", BATCH), ("z", BATCH), ("c", 7), ("z", 7)], "a unit of work is a batch of fixed size"


def test_calibration_on_the_test_set_gives_every_element_the_training_targets_moments(tmp_path: Path) -> None:
    rows = decoded(tmp_path, "test_set")[0].rows("z", IDS)
    wanted = SemanticSource(NUM).targets("z", range(50, 50 + NUM)).astype(np.float64)
    assert rows.mean(axis=0, dtype=np.float64) == pytest.approx(wanted.mean(0), abs=1e-5)
    assert rows.std(axis=0, dtype=np.float64) == pytest.approx(wanted.std(0), abs=1e-5)


def test_one_factor_for_a_target_keeps_directions_and_gives_the_variance_of_training_targets(
    tmp_path: Path,
) -> None:
    rows = decoded(tmp_path, "test_set", by="target")[0].rows("z", IDS).astype(np.float64)
    raw = LinearPredictor().predict("z", 1, SemanticSource(NUM).voxels(1, IDS), IDS).astype(np.float64)
    wanted = SemanticSource(NUM).targets("z", range(50, 50 + NUM)).astype(np.float64)
    assert rows.mean(axis=0) == pytest.approx(wanted.mean(0), abs=1e-5)
    assert rows.var(axis=0).mean() == pytest.approx(wanted.var(axis=0).mean(), rel=1e-5)
    factor = (rows - rows.mean(axis=0)) / (raw - raw.mean(axis=0))
    assert factor == pytest.approx(factor.flat[0], rel=1e-3)


def test_other_targets_are_calibrated_only_where_the_settings_name_them(tmp_path: Path) -> None:
    source = SemanticSource(NUM)
    raw = LinearPredictor().predict("c", 1, source.voxels(1, IDS), IDS)
    assert (decoded(tmp_path / "z", "test_set")[0].rows("c", IDS) == raw).all()
    both, _ = decoded(tmp_path / "both", "test_set", ("initial", "semantic"))
    wanted = source.targets("c", range(50, 50 + NUM)).astype(np.float64)
    assert both.rows("c", IDS).std(axis=0, dtype=np.float64) == pytest.approx(wanted.std(0), abs=1e-5)
    assert both.rows("c", IDS).mean(axis=0, dtype=np.float64) == pytest.approx(wanted.mean(0), abs=1e-5)
    assert (both.rows("z", IDS) == decoded(tmp_path / "again", "test_set")[0].rows("z", IDS)).all()


def test_stored_calibration_uses_predictions_of_training_images_and_predicts_nothing_else_of_them(
    tmp_path: Path,
) -> None:
    source, train = SemanticSource(NUM), list(range(50, 50 + NUM))
    predicted = LinearPredictor().predict("z", 1, source.voxels(1, train), []).astype(np.float64)
    wanted = source.targets("z", train).astype(np.float64)
    raw = LinearPredictor().predict("z", 1, source.voxels(1, [5]), [])[0]
    expected = (raw - predicted.mean(0)) / predicted.std(0) * wanted.std(0) + wanted.mean(0)
    stored, asked = decoded(tmp_path, "stored")
    assert stored.rows("z", [5])[0] == pytest.approx(expected, abs=1e-5)
    assert asked[-2:] == [("z", BATCH), ("z", 7)]


def test_moments_do_not_depend_on_how_rows_are_cut() -> None:
    rows = np.random.default_rng(0).normal(5.0, 0.01, (23, 3)).astype(np.float32)
    whole = Moments([Summary.of(rows)])
    pieces = Moments(Summary.of(part) for part in (rows[:1], rows[1:10], rows[10:]))
    assert whole.mean == pytest.approx(pieces.mean, abs=1e-12)
    assert whole.std() == pytest.approx(rows.astype(np.float64).std(axis=0), abs=1e-12)
    assert pieces.std() == pytest.approx(whole.std(), abs=1e-12)


def test_a_target_that_the_decoder_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not predict target g02"):
        decoded(tmp_path, "none")[0].rows("g02", [0])


def test_one_target_predicted_alone_has_the_bits_that_it_has_among_all(tmp_path: Path) -> None:
    specs = [TargetSpec(name, role_of(name), SHAPES[name]) for name in ("c", "z", "g02")]
    for heads in ("single", "joint"):
        config = toy_config(tmp_path).decoder.model_copy(update={"heads": heads, "prior_depth": 1})
        torch.manual_seed(1)
        decoder = Decoder(config, {1: NUM_VOXELS[1]}, specs)
        decoder.save(tmp_path / heads)
        voxels, seeds = ToySource(NUM).voxels(1, IDS[:5]), prediction_seeds(3, 1, IDS[:5])
        whole = decoder.eval().predict(torch.from_numpy(voxels), 1, seeds)
        folder = DecoderFolder(tmp_path / heads, torch.device("cpu"))
        assert folder.names == ("c", "z", "g02")
        for name in folder.names:
            assert (folder.predict(name, 1, voxels, seeds) == whole[name].numpy()).all()


def test_seeds_belong_to_subject_and_image() -> None:
    assert prediction_seeds(0, 1, [4, 5])[1] == prediction_seeds(0, 1, [5])[0]
    assert len({*prediction_seeds(0, 1, [4, 5]), *prediction_seeds(0, 2, [4, 5]), *prediction_seeds(1, 1, [4])}) == 5


def test_true_targets_are_the_sources(tmp_path: Path) -> None:
    source = ToySource()
    assert (TrueTargets(source).rows("c", [2, 1]) == source.targets("c", [2, 1])).all()
