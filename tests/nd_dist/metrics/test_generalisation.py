from __future__ import annotations

import numpy as np
import pytest
import torch

from nd_dist.metrics.generalisation import (
    NEARER,
    SEEN_TO_TRAINED,
    TO_SEEN,
    TO_TRAINED,
    drops,
    effective_dimension,
    nearest_similarity,
    per_image,
    scored_means,
    similarities,
    unpaired_difference,
)
from nd_dist.metrics.statistics.scores import EACH, WINS, Statistics

STATISTICS = Statistics(200)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_nearest_of_many_training_pictures_is_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, trained = noise(7, 20), noise(50, 20, seed=1)
    expected = np.corrcoef(rows, trained)[:7, 7:].max(axis=1)
    monkeypatch.setattr("nd_dist.metrics.generalisation.BLOCK_ROWS", 8)
    np.testing.assert_allclose(nearest_similarity(rows, trained), expected, atol=1e-12)


def test_a_retriever_is_told_from_a_decoder_that_generalises() -> None:
    seen, trained = noise(30, 40), noise(200, 40, seed=1)
    decoder = [seen + 0.5 * noise(30, 40, seed=2 + repeat) for repeat in range(2)]
    retriever = [trained[np.corrcoef(recon, trained)[:30, 30:].argmax(axis=1)] for recon in decoder]
    every = np.arange(30)
    found = {
        name: scored_means(similarities(recons, seen, trained), every, STATISTICS)
        for name, recons in (("decoder", decoder), ("retriever", retriever))
    }
    assert found["decoder"][NEARER].value == 1
    assert found["retriever"][NEARER].value == 0
    assert found["retriever"][TO_TRAINED].value == pytest.approx(1)
    assert found["decoder"][TO_SEEN].value > found["retriever"][TO_SEEN].value
    assert found["decoder"][SEEN_TO_TRAINED].value == found["retriever"][SEEN_TO_TRAINED].value
    low, high = (found["decoder"][TO_SEEN].as_json()[end] for end in ("ci_low", "ci_high"))
    assert low < found["decoder"][TO_SEEN].value < high


def test_a_repeat_that_is_nearer_counts_as_its_share() -> None:
    seen, trained = noise(4, 10), noise(9, 10, seed=1)
    values = similarities([seen, trained[:4]], seen, trained)
    assert values[NEARER].tolist() == [0.5] * 4


def test_a_group_that_is_worse_drops_and_one_like_the_others_does_not() -> None:
    each = torch.from_numpy(0.5 + 0.1 * noise(60))
    wins = torch.from_numpy((np.random.default_rng(3).random((60, 60)) < 0.7).astype(np.int32)).fill_diagonal_(0)
    worse, alike = np.arange(20), np.arange(20, 40)
    each[:20] -= 1.0
    wins[:, :20] = 0
    arrays = {EACH + "pixcorr": each, WINS + "clip": wins}
    values = per_image(arrays, 1, "real")
    found = drops(values, worse, STATISTICS)
    assert found["pixcorr"].value == pytest.approx(float(each[:20].mean() - each[20:].mean()))
    assert found["clip"].value == pytest.approx(-float(wins[:, 20:].sum()) / (40 * 59))
    assert all(item.as_json()["ci_high"] < 0 for item in found.values())
    assert scored_means(values, worse, STATISTICS)["clip"].value == 0
    same = drops({"pixcorr": values["pixcorr"][20:]}, alike - 20, STATISTICS)["pixcorr"].as_json()
    assert same["ci_low"] < 0 < same["ci_high"]


def test_the_dimension_is_the_number_of_directions_that_vary_alike() -> None:
    basis = np.linalg.qr(noise(50, 50))[0]
    flat = noise(400, 5, seed=1) @ basis[:5]
    values = np.linalg.eigvalsh(np.cov(flat.T))
    assert effective_dimension(flat) == pytest.approx(values.sum() ** 2 / np.square(values).sum())
    assert 4.5 < effective_dimension(flat) <= 5
    assert effective_dimension(flat + 0.5 * noise(400, 50, seed=2)) > 10
    assert effective_dimension(np.ones((3, 2, 2))) == 0


def test_differences_between_sets_of_different_pictures_add_their_uncertainties() -> None:
    first, second = 0.5 + 0.1 * noise(2000), 0.3 + 0.1 * noise(2000, seed=1)
    value, low, high = unpaired_difference((0.5, first, 100), (0.3, second, 100))
    assert value == pytest.approx(0.2)
    assert low is not None
    assert high is not None
    assert (high - low) / (2 * 1.96) == pytest.approx(0.1 * np.sqrt(2), rel=0.1)
    same = unpaired_difference((0.5, first, 100), (0.5, first, 100))
    assert same[1] is not None
    assert same[1] < -0.1
    assert unpaired_difference((0.5, first, 3), (0.3, second, 100))[1:] == (None, None)
