from __future__ import annotations

import numpy as np

from shards.packing.image_means import ImageMeans
from shards.packing.normalize import zscore

YES = np.ones(4, dtype=np.bool_)


def array(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_every_image_counts_once_whatever_the_number_and_sessions_of_its_trials() -> None:
    """By hand: image 7 has 1, 2, 3 (mean 2), image 8 has 4, 8 (mean 6), image 9 has 10; means 2, 6, 10."""
    images = ImageMeans(np.array([7, 8, 7, 9, 8, 7]))
    images.add(array([1.0], [4.0], [2.0]), np.array([7, 8, 7]), YES[:3])
    assert not images.is_complete
    images.add(array([10.0], [8.0], [3.0]), np.array([9, 8, 7]), YES[:3])
    assert images.is_complete
    moments = images.moments
    assert moments.count.tolist() == [3.0]
    assert moments.mean.tolist() == [6.0], "single trials would have the mean 28 / 6"
    assert moments.std(1).tolist() == [4.0], "sqrt((16 + 0 + 16) / 2)"
    values_TV, _ = zscore(array([1.0], [4.0], [2.0]), moments, 1)
    np.testing.assert_allclose(values_TV[:, 0], [-1.25, -0.5, -1.0])


def test_trials_that_are_not_fitted_do_not_count() -> None:
    images = ImageMeans(np.array([1, 2]))
    images.add(array([1.0], [100.0], [3.0]), np.array([1, 5, 2]), np.array([True, False, True]))
    assert images.moments.mean.tolist() == [2.0]


def test_a_session_in_which_a_voxel_is_dead_takes_no_part_in_the_means_of_that_voxel() -> None:
    """By hand: voxel 1 is dead in the second session, so image 1 has the mean 2 there, and image 3 none."""
    images = ImageMeans(np.array([1, 2, 1, 3]))
    images.add(array([2.0, 2.0], [6.0, 6.0]), np.array([1, 2]), YES[:2])
    images.add(array([4.0, np.nan], [9.0, 5.0]), np.array([1, 3]), YES[:2])
    assert images.moments.count.tolist() == [3.0, 2.0]
    np.testing.assert_allclose(images.moments.mean, [(3 + 6 + 9) / 3, (2 + 6) / 2])
    np.testing.assert_allclose(images.moments.std(1), [3.0, np.sqrt(8.0)])


def test_a_voxel_that_is_dead_everywhere_has_no_moments_and_disturbs_no_other() -> None:
    images = ImageMeans(np.array([1, 2]))
    images.add(array([1.0, 0.0], [5.0, 0.0]), np.array([1, 2]), YES[:2])
    assert images.moments.count.tolist() == [2.0, 0.0]
    assert images.moments.std(1)[1] == 0.0


def test_sums_are_held_only_until_an_images_last_trial() -> None:
    rng = np.random.default_rng(0)
    order = np.repeat(np.arange(30), 3)  # an image's trials follow each other, ten images a session
    images = ImageMeans(order)
    betas_TV = rng.normal(size=(90, 5)).astype(np.float32)
    for start in range(0, 90, 30):
        images.add(betas_TV[start : start + 30], order[start : start + 30], np.ones(30, dtype=np.bool_))
        assert images._begun == {}
    means = betas_TV.astype(np.float64).reshape(30, 3, 5).mean(axis=1)
    np.testing.assert_allclose(images.moments.mean, means.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(images.moments.std(1), means.std(axis=0, ddof=1), rtol=1e-5)
