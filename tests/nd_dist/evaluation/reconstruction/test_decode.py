"""Predictions on disk: fixed batches, row reads, calibration of z."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import ConfigError
from nd_dist.evaluation.reconstruction.decode import (
    BATCH,
    DecodeSettings,
    Moments,
    StoredTargets,
    TrueTargets,
    decode_subject,
    prediction_seeds,
    target_moments,
)
from tests.nd_dist.evaluation.toy_world import ToySource

NUM = BATCH + 7


class SemanticSource(ToySource):
    """The toy source with c in the shape that ``predict`` makes."""

    def targets(self, name: str, image_ids: Sequence[int]) -> np.ndarray:
        values = super().targets(name, image_ids)
        return values[:, :2, :3] if name == "c" else values


def predict(voxels_BV: np.ndarray, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    z = 3.0 + 2.0 * voxels_BV[:, :16].reshape(-1, 1, 4, 4)
    return {"c": voxels_BV[:, :6].reshape(-1, 2, 3), "z": np.tile(z, (1, 4, 2, 2)).astype(np.float32)}


def decoded(folder: Path, calibration: str) -> StoredTargets:
    settings = DecodeSettings(calibration, 0)
    folder.mkdir()
    decode_subject(folder, predict, ToySource(NUM), 1, list(range(NUM)), settings)
    return StoredTargets(folder, list(range(NUM)))


def test_stored_rows_are_the_predictions_in_any_order(tmp_path: Path) -> None:
    source, ids = ToySource(NUM), [NUM - 1, 0, BATCH]
    stored = decoded(tmp_path / "p", "none")
    expected = predict(source.voxels(1, ids), [0, 0, 0])
    assert (stored.rows("c", ids) == expected["c"]).all()
    assert (stored.rows("z", ids) == expected["z"]).all()


def test_calibration_on_the_test_set_gives_every_element_the_training_targets_moments(tmp_path: Path) -> None:
    stored = decoded(tmp_path / "p", "test_set").rows("z", list(range(NUM)))
    wanted = target_moments(ToySource(NUM), 1)
    assert stored.mean(axis=0, dtype=np.float64) == pytest.approx(wanted.mean, abs=1e-5)
    assert stored.std(axis=0, dtype=np.float64) == pytest.approx(wanted.std, abs=1e-5)


def test_other_targets_are_calibrated_only_where_the_settings_name_them(tmp_path: Path) -> None:
    source, ids = ToySource(NUM), list(range(NUM))
    raw = predict(source.voxels(1, ids), ids)["c"]
    assert (decoded(tmp_path / "z", "test_set").rows("c", ids) == raw).all()
    (tmp_path / "both").mkdir()
    settings = DecodeSettings("test_set", 0, calibrated=("initial", "semantic"))
    decode_subject(tmp_path / "both", predict, SemanticSource(NUM), 1, ids, settings)
    both = StoredTargets(tmp_path / "both", ids)
    wanted = target_moments(SemanticSource(NUM), 1, "c")
    assert both.rows("c", ids).std(axis=0, dtype=np.float64) == pytest.approx(wanted.std, abs=1e-5)
    assert both.rows("c", ids).mean(axis=0, dtype=np.float64) == pytest.approx(wanted.mean, abs=1e-5)
    assert (both.rows("z", ids) == decoded(tmp_path / "again", "test_set").rows("z", ids)).all()


def test_stored_calibration_uses_predictions_of_training_images_only(tmp_path: Path) -> None:
    source = ToySource(NUM)
    train = source.images(1, "train")
    predicted = predict(source.voxels(1, train), [])["z"].astype(np.float64)
    wanted = source.targets("z", train).astype(np.float64)
    raw = predict(source.voxels(1, [5]), [])["z"][0]
    expected = (raw - predicted.mean(0)) / predicted.std(0) * wanted.std(0) + wanted.mean(0)
    assert decoded(tmp_path / "p", "stored").rows("z", [5])[0] == pytest.approx(expected, abs=1e-5)


def test_moments_do_not_depend_on_how_rows_are_cut() -> None:
    rows = np.random.default_rng(0).normal(5.0, 0.01, (23, 3)).astype(np.float32)
    whole = Moments(iter([rows]))
    pieces = Moments(iter([rows[:1], rows[1:10], rows[10:]]))
    assert whole.mean == pytest.approx(pieces.mean, abs=1e-12)
    assert whole.std == pytest.approx(rows.astype(np.float64).std(axis=0), abs=1e-12)
    assert pieces.std == pytest.approx(whole.std, abs=1e-12)


def test_a_target_that_the_decoder_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not predict target g02"):
        decoded(tmp_path / "p", "none").rows("g02", [0])


def test_seeds_belong_to_subject_and_image() -> None:
    assert prediction_seeds(0, 1, [4, 5])[1] == prediction_seeds(0, 1, [5])[0]
    assert len({*prediction_seeds(0, 1, [4, 5]), *prediction_seeds(0, 2, [4, 5]), *prediction_seeds(1, 1, [4])}) == 5


def test_true_targets_are_the_sources(tmp_path: Path) -> None:
    source = ToySource()
    assert (TrueTargets(source).rows("c", [2, 1]) == source.targets("c", [2, 1])).all()
