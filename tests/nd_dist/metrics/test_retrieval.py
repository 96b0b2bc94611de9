"""Retrieval: directions by name, draws, interval."""

import numpy as np
import pytest

from nd_dist.metrics.published import AUTHORS_DIRECTION, PUBLISHED
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, draw_candidates, image_hits, retrieve


def test_directions_on_a_worked_example() -> None:
    # rows are brains, columns pictures: brain 1 prefers picture 0; picture 0 still prefers brain 0
    cosines = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.2], [0.1, 0.4, 0.7]])
    assert image_hits(cosines).tolist() == [True, False, True]
    assert brain_hits(cosines).tolist() == [True, True, True]


def test_cosines_flatten_features_and_ignore_their_length() -> None:
    rng = np.random.default_rng(0)
    brains, images = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 2, 3))
    expected = [[np.dot(b.ravel(), i.ravel()) / np.linalg.norm(b) / np.linalg.norm(i) for i in images] for b in brains]
    assert cosine_matrix(brains, 7 * images) == pytest.approx(np.array(expected), abs=1e-12)


def test_draws_are_without_replacement_and_a_function_of_the_seed() -> None:
    picks = draw_candidates(50, seed=1, num_candidates=20, num_draws=5)
    assert picks.shape == (5, 20)
    assert all(len(set(pick.tolist())) == 20 for pick in picks)
    assert (picks == draw_candidates(50, seed=1, num_candidates=20, num_draws=5)).all()
    assert (picks != draw_candidates(50, seed=2, num_candidates=20, num_draws=5)).any()


def test_with_few_images_all_of_them_are_candidates_once() -> None:
    assert draw_candidates(24, seed=0).tolist() == [list(range(24))]


def test_mean_and_interval_are_those_of_the_draws() -> None:
    rng = np.random.default_rng(3)
    images = rng.standard_normal((60, 8))
    cosines = cosine_matrix(images + 2.0 * rng.standard_normal((60, 8)), images)
    picks = draw_candidates(60, seed=0, num_candidates=30, num_draws=10)
    found = retrieve(cosines, picks, find="image")
    each = [np.mean([cosines[i, pick].argmax() == k for k, i in enumerate(pick)]) for pick in picks]
    assert found.each.tolist() == pytest.approx(each)
    assert found.mean == pytest.approx(np.mean(each))
    assert found.ci_high - found.mean == pytest.approx(1.96 * np.std(each) / np.sqrt(10))
    assert found.num_candidates == 30
    assert retrieve(cosines.T, picks, find="brain").each.tolist() == found.each.tolist()


def authors_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """MindEye2's ``batchwise_cosine_similarity``: rows of the result are the *second* argument."""
    return cosine_matrix(first, second).T


def test_a_published_row_has_the_directions_that_its_authors_functions_compute() -> None:
    rng = np.random.default_rng(5)
    images = rng.standard_normal((60, 8))
    brains = 0.6 * images + rng.standard_normal((60, 8))
    forward = np.mean(authors_similarity(brains, images).argmax(axis=1) == np.arange(60))  # printed as "fwd"
    backward = np.mean(authors_similarity(images, brains).argmax(axis=1) == np.arange(60))  # printed as "bwd"
    cosines = cosine_matrix(brains, images)
    ours = {"image_retrieval": image_hits(cosines).mean(), "brain_retrieval": brain_hits(cosines).mean()}
    assert forward != backward
    assert (ours[AUTHORS_DIRECTION["fwd"]], ours[AUTHORS_DIRECTION["bwd"]]) == (forward, backward)
    first = next(row for row in PUBLISHED if row.is_first_hand)  # its notebook prints fwd .9996, bwd .9987
    assert (first.values["brain_retrieval"], first.values["image_retrieval"]) == pytest.approx((0.9996, 0.9987))
    quoted = [row for row in PUBLISHED if "direction not known" in row.note]
    assert {row.method for row in quoted} == {"MindEye2", "MindTuner", "ROITok (IP-Adapter)"}
    assert not [name for row in quoted for name in row.values if "retrieval" in name]
