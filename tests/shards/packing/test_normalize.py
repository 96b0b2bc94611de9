from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nd_dist.errors import DataError
from shards.packing.normalize import SCHEMES, ImageMeans, fit, invalid_voxels, merge, zscore


@pytest.fixture
def betas() -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return (rng.normal(2, 3, (40, 12)) * np.linspace(0.1, 5, 12)).astype(np.float32)


IS_FITTED = np.arange(40) % 5 != 0


def test_fitted_trials_have_mean_zero_and_variance_one(betas: npt.NDArray[np.float32]) -> None:
    values_TV, num_invalid = zscore(betas, fit(betas, IS_FITTED, "s"), ddof=0)
    assert num_invalid == 0
    np.testing.assert_allclose(values_TV[IS_FITTED].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(values_TV[IS_FITTED].std(axis=0), 1, atol=1e-5)
    assert abs(values_TV.mean(axis=0)).max() > 1e-3, "test trials must not take part in the fit"


def test_sessions_merged_in_parts_equal_one_fit_over_all(betas: npt.NDArray[np.float32]) -> None:
    parts = [fit(betas[start : start + 10], IS_FITTED[start : start + 10], "s") for start in range(0, 40, 10)]
    merged, whole = merge(parts), fit(betas, IS_FITTED, "s")
    np.testing.assert_allclose(merged.mean, betas[IS_FITTED].mean(axis=0, dtype=np.float64), rtol=1e-10)
    np.testing.assert_allclose(merged.std(1), betas[IS_FITTED].astype(np.float64).std(axis=0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(merged.std(1), whole.std(1), rtol=1e-10)


@pytest.mark.parametrize("fill", [0.0, 7.5, np.nan, np.inf])
def test_constant_and_not_finite_voxels_become_zero_and_do_not_touch_others(
    betas: npt.NDArray[np.float32], fill: float
) -> None:
    clean_TV, _ = zscore(betas, fit(betas, IS_FITTED, "s"), 0)
    broken = betas.copy()
    broken[:, 3] = fill
    values_TV, num_invalid = zscore(broken, fit(broken, IS_FITTED, "s"), 0)
    assert num_invalid == 1
    assert (values_TV[:, 3] == 0).all()
    np.testing.assert_array_equal(np.delete(values_TV, 3, axis=1), np.delete(clean_TV, 3, axis=1))


def test_one_missing_value_makes_the_voxel_invalid_in_this_session(betas: npt.NDArray[np.float32]) -> None:
    betas[7, 2] = np.nan
    assert np.flatnonzero(invalid_voxels(betas)).tolist() == [2]


def test_a_voxel_that_is_constant_in_the_fitted_trials_only_is_zero(betas: npt.NDArray[np.float32]) -> None:
    betas[IS_FITTED, 4] = 1.5
    values_TV, num_invalid = zscore(betas, fit(betas, IS_FITTED, "s"), 0)
    assert num_invalid == 1
    assert (values_TV[:, 4] == 0).all()


def test_a_session_in_which_a_voxel_is_dead_takes_no_part_in_the_merged_fit(betas: npt.NDArray[np.float32]) -> None:
    first, second = betas[:20].copy(), betas[20:].copy()
    second[:, 5] = 0
    merged = merge([fit(part, np.ones(20, bool), "s") for part in (first, second)])
    assert merged.mean[5] == pytest.approx(first[:, 5].mean(dtype=np.float64))
    assert merged.count[5] == 20
    values_TV, num_invalid = zscore(second, merged, 1)
    assert num_invalid == 1
    assert (values_TV[:, 5] == 0).all()


def test_a_voxel_that_is_dead_in_every_session_is_zero(betas: npt.NDArray[np.float32]) -> None:
    betas[:, 0] = np.nan
    merged = merge([fit(part, np.ones(20, bool), "s") for part in (betas[:20], betas[20:])])
    values_TV, num_invalid = zscore(betas[:20], merged, 1)
    assert num_invalid == 1
    assert np.isfinite(values_TV).all()


def test_too_few_trials_are_an_error_that_names_the_session(betas: npt.NDArray[np.float32]) -> None:
    with pytest.raises(DataError, match="subject 3, session 9"):
        fit(betas, np.zeros(40, bool), "subject 3, session 9")


def test_schemes_are_what_their_sources_say() -> None:
    assert SCHEMES["session-train"].per_session
    assert not SCHEMES["session-train"].uses_test
    assert SCHEMES["mindeye1"].per_session
    assert SCHEMES["mindeye1"].uses_test
    assert SCHEMES["mindeye2"] == SCHEMES["session-train"], "MindEye2's paper leaves the shared images out of the fit"
    assert not SCHEMES["brain-diffuser"].per_session
    assert not SCHEMES["brain-diffuser"].uses_test
    assert SCHEMES["brain-diffuser"].ddof == 1


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
