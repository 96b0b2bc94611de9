"""The probe for kinds: against plain formulas and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multilabel_ranking_average_precision

from nd_dist.metrics import kind


def pictures(num: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (num, 4, 6) around one centre a class, and labels of five classes."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, 4, 6))
    classes = generator.choice(5, num, p=[0.4, 0.15, 0.15, 0.15, 0.15])
    features = centres[classes] + noise * generator.normal(size=(num, 4, 6))
    return features.astype(np.float32), np.eye(5, dtype=bool)[classes]


def read(probe: kind.Probe, features: np.ndarray, labels: np.ndarray) -> float:
    return float(kind.each_picture(probe.scores(features), labels).mean())


def test_classes_that_lie_apart_are_all_read() -> None:
    assert read(kind.fit_probe(*pictures(60, 0.1)), *pictures(40, 0.1, seed=1)) == 1.0


def test_features_without_the_kind_are_not_read_better_than_by_naming_the_commonest_class() -> None:
    probe = kind.fit_probe(*pictures(200, 1.0))
    _, labels = pictures(3000, 1.0, seed=1)
    other, _ = pictures(3000, 1.0, seed=2)
    chance = float(kind.each_picture(probe.share_K, labels).mean())
    assert chance == pytest.approx(labels[:, 0].mean())  # the class of most training pictures
    assert read(probe, other, labels) < chance


@pytest.mark.parametrize("num", [15, 60])  # fewer pictures than feature values, and more
def test_the_probe_is_the_ridge_regression_of_the_labels_at_the_best_left_out_penalty(num: int) -> None:
    features, labels = pictures(num, 1.0)
    probe, rows = kind.fit_probe(features, labels), features.reshape(num, -1).astype(np.float64)

    def fitted(own: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centred = rows[own] - rows[own].mean(axis=0)
        gram = centred.T @ centred + penalty * np.eye(rows.shape[1])
        slope = np.linalg.solve(gram, centred.T @ (labels[own] - labels[own].mean(axis=0)))
        return rows[own].mean(axis=0), slope, labels[own].mean(axis=0)

    def left_out(penalty: float) -> float:
        errors = []
        for image in range(num):
            mean, slope, share = fitted(np.arange(num) != image, penalty)
            errors.append(np.square((rows[image] - mean) @ slope + share - labels[image]).sum())
        return float(np.sum(errors))

    mean, slope, share = fitted(np.ones(num, dtype=bool), probe.penalty)
    fresh, _ = pictures(7, 1.0, seed=3)
    np.testing.assert_allclose(probe.scores(fresh), (fresh.reshape(7, -1) - mean) @ slope + share, atol=1e-6)
    assert left_out(probe.penalty) <= min(left_out(probe.penalty * factor) for factor in (0.56, 1.78, 0.1, 10.0))


def test_several_classes_a_picture_are_ranked_as_torchmetrics_does_also_where_scores_are_equal() -> None:
    generator = np.random.default_rng(5)
    labels = generator.random((50, 6)) < 0.4
    labels = labels[labels.any(axis=1)]
    scores = generator.integers(0, 8, labels.shape) / 8.0
    found = float(kind.each_picture(scores, labels).mean())
    expected = multilabel_ranking_average_precision(torch.tensor(scores), torch.tensor(labels).long(), num_labels=6)
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_a_picture_without_a_class_adds_the_mean_of_the_others() -> None:
    scores, labels = np.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.4]]), np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    assert kind.each_picture(scores, labels).tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="no picture has"):
        kind.each_picture(scores, np.zeros_like(labels))


@pytest.mark.parametrize(
    ("num", "value", "words"),
    [(2, 0.5, "three pictures"), (9, np.nan, "finite"), (9, 0.1, "differ"), (9, 0.0, "differ")],
)
def test_what_cannot_be_fitted_is_refused(num: int, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind.fit_probe(np.full((num, 4), value), np.ones((num, 2), dtype=bool))
