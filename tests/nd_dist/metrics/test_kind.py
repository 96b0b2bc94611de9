"""The probe for kinds: against plain formulas, torchmetrics, and every order of a few pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_average_precision

from nd_dist.metrics import kind


def pictures(num: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (num, 4, 6) around one centre a class, and labels of five classes."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, 4, 6))
    classes = generator.choice(5, num, p=[0.4, 0.15, 0.15, 0.15, 0.15])
    features = centres[classes] + noise * generator.normal(size=(num, 4, 6))
    return features.astype(np.float32), np.eye(5, dtype=bool)[classes]


def test_classes_that_lie_apart_are_all_read() -> None:
    probe = kind.fit_probe(*pictures(60, 0.1))
    found = kind.accuracy(probe, *pictures(40, 0.1, seed=1))
    assert found.value == 1.0
    assert found.each.sum() == 40
    assert kind.average_precision(probe, *pictures(40, 0.1, seed=1)).value == 1.0


def test_features_without_the_kind_are_read_at_chance() -> None:
    probe = kind.fit_probe(*pictures(200, 1.0))
    _, labels = pictures(3000, 1.0, seed=1)
    other, _ = pictures(3000, 1.0, seed=2)
    found = kind.accuracy(probe, other, labels)
    assert found.chance == pytest.approx(labels[:, 0].mean())  # the class of most training pictures
    assert found.value < found.chance
    precision = kind.average_precision(probe, other, labels)
    assert precision.value == pytest.approx(precision.chance, abs=0.03)


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


def test_average_precision_is_that_of_torchmetrics_also_where_scores_are_equal() -> None:
    generator = np.random.default_rng(5)
    labels = generator.random((50, 3)) < [0.1, 0.3, 0.7]
    scores = generator.integers(0, 8, (50, 3)) / 8.0
    probe = kind.Probe(np.zeros(3), np.eye(3), np.zeros(3), 0.0)
    found = kind.average_precision(probe, scores, labels)
    for k, value in enumerate(found.each):
        expected = binary_average_precision(torch.tensor(scores[:, k]), torch.tensor(labels[:, k]).long())
        assert value == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("own", [1, 2, 4, 6])
def test_chance_of_average_precision_is_the_mean_over_all_orders(own: int) -> None:
    probe, labels = kind.Probe(np.zeros(1), np.eye(1), np.zeros(1), 0.0), np.arange(6)[:, None] < own
    orders = [np.array(order, dtype=float)[:, None] for order in itertools.permutations(range(6))]
    values = [kind.average_precision(probe, order, labels).value for order in orders]
    assert kind.average_precision(probe, orders[0], labels).chance == pytest.approx(np.mean(values))


def test_a_class_that_is_in_no_picture_is_not_scored() -> None:
    probe = kind.fit_probe(*pictures(60, 0.1))
    features, labels = pictures(40, 0.1, seed=1)
    kept = ~labels[:, 3]
    assert len(kind.average_precision(probe, features[kept], labels[kept]).each) == 4
    with pytest.raises(ValueError, match="needs a class"):
        kind.average_precision(probe, features, np.zeros_like(labels))


@pytest.mark.parametrize(
    ("num", "value", "words"),
    [(2, 0.5, "three pictures"), (9, np.nan, "finite"), (9, 0.1, "differ"), (9, 0.0, "differ")],
)
def test_what_cannot_be_fitted_is_refused(num: int, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind.fit_probe(np.full((num, 4), value), np.ones((num, 2), dtype=bool))
