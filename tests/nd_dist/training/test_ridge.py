"""Ridge regression as a decoder: against plain formulas, through whole trainings, over ranks in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError, DataError, Requeue
from nd_dist.models.ridge import RidgeDecoder, block_name, load_decoder
from nd_dist.training import ridge
from nd_dist.training.records import ridge_dir
from tests.nd_dist.training.one_rank import names, run
from tests.ranks.recipe import small_recipe
from tests.ranks.synthetic import NUM_IMAGES, SHAPES, SyntheticSource

RIDGE = {"decoder.kind": "ridge"}
TRAINED = ("c", "z", "g02")


def recipe(folder: Path, **settings: Any) -> Config:
    return small_recipe(folder).replaced({**RIDGE, **settings})


def model_dir(config: Config) -> Path:
    return config.run_dir / "checkpoints" / "stage2" / "model"


def by_definition(rows_NV: np.ndarray, target_ND: np.ndarray, weight_N: np.ndarray, penalty: float) -> Any:
    """Return a function of voxels: the weighted ridge regression from its normal equations."""
    mean_V, mean_D = (np.average(values, axis=0, weights=weight_N) for values in (rows_NV, target_ND))
    centred = rows_NV - mean_V
    gram = centred.T @ (weight_N[:, None] * centred) + penalty * np.eye(centred.shape[1])
    slope = np.linalg.solve(gram, centred.T @ (weight_N[:, None] * (target_ND - mean_D)))
    return lambda voxels: (voxels - mean_V) @ slope + mean_D


def training_set(subject: int = 1) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    source, ids = SyntheticSource(), list(range(NUM_IMAGES))
    voxels, counts = source.mean_voxels(subject, ids, None)
    weight = np.array(counts) / np.mean(counts)
    return voxels.astype(float), weight, {name: source.image_targets(name, ids).astype(float) for name in TRAINED}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[dict[str, Any]]]:
    config = recipe(tmp_path_factory.mktemp("ridge"))
    return config, run(config)


def test_predictions_are_those_of_the_normal_equations(fitted: tuple[Config, list[dict[str, Any]]]) -> None:
    decoder = RidgeDecoder.load(model_dir(fitted[0]))
    voxels, weight, targets = training_set()
    fresh = SyntheticSource().clean_voxels(1, np.arange(NUM_IMAGES, NUM_IMAGES + 5))
    found = decoder.predict(torch.from_numpy(fresh), 1, range(5))
    for name, target in targets.items():
        expected = by_definition(voxels, target.reshape(NUM_IMAGES, -1), weight, decoder.penalties[name])(fresh)
        np.testing.assert_allclose(found[name].reshape(5, -1), expected, atol=2e-5)
        assert found[name].shape[1:] == SHAPES[name]


@pytest.mark.parametrize("num_voxels", [10, 40, 70])  # fewer voxels than images, and more
def test_the_leave_one_out_error_is_that_of_fits_without_each_image(num_voxels: int) -> None:
    generator = np.random.default_rng(num_voxels)
    voxels = generator.normal(size=(30, num_voxels))
    weight = generator.integers(1, 4, 30) / 2.0
    weight /= weight.mean()
    target = voxels[:, :3] + generator.normal(size=(30, 3))
    basis, _, _ = ridge.decompose(torch.from_numpy(voxels), torch.from_numpy(weight))
    centred = target - np.average(target, axis=0, weights=weight)
    rows = torch.from_numpy(centred * np.sqrt(weight)[:, None])
    for penalty, error in zip((0.5, 20.0), ridge.leave_one_out(basis, rows, (0.5, 20.0)), strict=True):
        others = [np.arange(30) != image for image in range(30)]
        residuals = [
            target[i] - by_definition(voxels[k], target[k], weight[k], penalty)(voxels[i])
            for i, k in enumerate(others)
        ]
        expected = np.sum(weight[:, None] * np.square(residuals)) / float(rows.square().sum())
        assert error == pytest.approx(expected, rel=1e-6)


def test_the_penalty_is_the_best_one_unless_the_recipe_names_it(tmp_path: Path) -> None:
    config = recipe(tmp_path, **{"decoder.ridge_penalty": 7.5})
    run(config)
    assert set(RidgeDecoder.load(model_dir(config)).penalties.values()) == {7.5}


def test_a_fit_that_was_stopped_continues_and_keeps_what_is_there(
    fitted: tuple[Config, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, asked = recipe(tmp_path), iter([False, False, True])
    with pytest.raises(Requeue):
        run(config, should_stop=lambda: next(asked))
    kept = model_dir(config) / block_name("c", 0)
    before = kept.stat().st_mtime_ns
    assert not (model_dir(config) / "config.json").exists()  # no model yet
    run(config)
    assert kept.stat().st_mtime_ns == before
    one, two = (json.loads((model_dir(c) / "config.json").read_text()) for c in (fitted[0], config))
    assert one == two  # hashes of all files included
    assert names(run(config)).count("stage_skipped") == 1  # finished


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    run(config)
    path = model_dir(config) / block_name("z", 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    decoder = load_decoder(model_dir(config))
    decoder.predict(torch.zeros(1, 40), 1, [0], only={"c"})  # other targets are as good as before
    with pytest.raises(CheckpointError, match="z-00000"):
        decoder.predict(torch.zeros(1, 40), 1, [0], only={"z"})


def test_voxels_of_another_subject_are_refused(fitted: tuple[Config, list[dict[str, Any]]]) -> None:
    with pytest.raises(ConfigError, match="subject 2 with 36 voxels"):
        RidgeDecoder.load(model_dir(fitted[0])).predict(torch.zeros(1, 36), 2, [0])


class OddSource(SyntheticSource):
    """A source with one fault."""

    fault = ""

    def fit_images(self, subject: int, sessions: object) -> list[int]:
        return list(range(2 if self.fault == "few" else NUM_IMAGES))

    def mean_voxels(self, subject: int, image_ids: Any, sessions: Any) -> tuple[np.ndarray, list[int]]:
        voxels, counts = super().mean_voxels(subject, image_ids, sessions)
        if self.fault == "voxel":
            voxels[4, 7] = np.nan
        if self.fault == "constant":
            voxels[:, :38] = 3.0
        return voxels, counts

    def image_targets(self, name: str, image_ids: Any) -> np.ndarray:
        target = super().image_targets(name, image_ids)
        if self.fault == "target" and name == "g02":
            target[5, 1, 1] = np.inf
        if self.fault == "zeros" and name == "z":
            target[:] = 0.0
        return target


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("few", "at least 3"),
        ("voxel", "subject 1, image 4, voxel 7"),
        ("target", "target g02, image 5"),
    ],
)
def test_what_cannot_be_fitted_is_refused_by_name(tmp_path: Path, fault: str, words: str) -> None:
    source = OddSource()
    source.fault = fault
    with pytest.raises(DataError, match=words):
        run(recipe(tmp_path), source)


@pytest.mark.parametrize("fault", ["constant", "zeros"])
def test_constant_voxels_and_targets_of_zeros_have_their_mean_as_the_prediction(tmp_path: Path, fault: str) -> None:
    source, config = OddSource(), recipe(tmp_path)
    source.fault = fault
    run(config, source)
    decoder = RidgeDecoder.load(model_dir(config))
    found = decoder.predict(torch.randn(3, 40), 1, range(3))
    assert all(bool(torch.isfinite(values).all()) for values in found.values())
    if fault == "zeros":
        assert not found["z"].any()
    else:
        assert decoder.get_buffer("right_VR").shape[1] == 2
        one, two = torch.zeros(2, 40), torch.zeros(2, 40)
        two[:, :38] = 1.0  # what never varied in training says nothing
        torch.testing.assert_close(decoder.predict(one, 1, [0, 0])["c"], decoder.predict(two, 1, [0, 0])["c"])


def test_a_regression_is_fitted_beside_a_network_whose_report_has_controls(tmp_path: Path) -> None:
    network = {"decoder.kind": "neuraldiffuser", "training.stages": [2], "evaluation.controls": True}
    config = recipe(tmp_path / "network", **network)
    run(config)
    beside = RidgeDecoder.load(ridge_dir(config.run_dir) / "model")
    alone = recipe(tmp_path / "alone")
    run(alone)
    assert beside.penalties == RidgeDecoder.load(model_dir(alone)).penalties
    before = (ridge_dir(config.run_dir) / "done.json").stat().st_mtime_ns
    run(config)
    assert (ridge_dir(config.run_dir) / "done.json").stat().st_mtime_ns == before


def test_another_recipe_does_not_continue_a_fit(tmp_path: Path) -> None:
    run(recipe(tmp_path))
    with pytest.raises(CheckpointError, match=r"decoder\.ridge_penalty"):
        run(recipe(tmp_path, **{"decoder.ridge_penalty": 2.0}))


def test_columns_in_several_blocks_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe(tmp_path / "whole")
    run(whole)
    for module in ("nd_dist.models.ridge", "nd_dist.training.ridge"):
        monkeypatch.setattr(f"{module}.BLOCK", 50)
    parts = recipe(tmp_path / "parts")
    run(parts)
    assert len(os.listdir(model_dir(parts))) > len(os.listdir(model_dir(whole)))
    voxels = torch.randn(4, 40)
    one, two = (RidgeDecoder.load(model_dir(config)).predict(voxels, 1, range(4)) for config in (whole, parts))
    for name in TRAINED:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
