"""Pixel metrics against scikit-image, numpy and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity as skimage_ssim
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.functional.regression import pearson_corrcoef

from nd_dist.metrics.pixel import GREY_WEIGHTS, Picture, pixel_correlation, structural_similarity

FIELD = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}


def pictures(num: int, size: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random pictures and noisy versions of them, (num, 3, size, size) in [0,1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((num, 3, 6, 6), generator=generator)
    originals = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.randn(originals.shape, generator=generator)
    return (originals + 0.1 * noise).clamp(0, 1), originals


def grey(picture_CHW: torch.Tensor) -> np.ndarray:
    return rgb2gray(picture_CHW.permute(1, 2, 0).double().numpy())


def test_pixcorr_is_numpys_correlation_of_the_flattened_pixels() -> None:
    recons, originals = pictures(4)
    expected = [
        np.corrcoef(r.flatten().numpy(), o.flatten().numpy())[0, 1] for r, o in zip(recons, originals, strict=True)
    ]
    assert pixel_correlation(recons, originals).numpy() == pytest.approx(expected, abs=1e-12)


def test_pixcorr_is_torchmetrics_pearson() -> None:
    recons, originals = pictures(3)
    expected = pearson_corrcoef(recons.flatten(1).double().T, originals.flatten(1).double().T)
    assert pixel_correlation(recons, originals).numpy() == pytest.approx(expected.numpy(), abs=1e-9)


def test_pictures_of_a_set_compare_as_pairs_of_their_own_do() -> None:
    recons, originals = pictures(3)
    original = Picture(originals[0], "columns")
    for number, recon in enumerate(Picture(pixels_CHW, "columns") for pixels_CHW in recons):
        alone = recons[number : number + 1], originals[:1]
        assert recon.correlation(original) == original.correlation(recon) == pixel_correlation(*alone).item()
        assert recon.similarity(original) == structural_similarity(*alone, "columns").item()


def test_pixcorr_of_two_worked_pictures() -> None:
    ramp = torch.tensor([0.0, 0.25, 0.5, 0.75]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert pixel_correlation(ramp, ramp).item() == pytest.approx(1.0)
    assert pixel_correlation(1 - ramp, ramp).item() == pytest.approx(-1.0)
    assert pixel_correlation(0.5 * ramp + 0.2, ramp).item() == pytest.approx(1.0)


def test_a_picture_of_one_colour_counts_as_no_correlation() -> None:
    recons, originals = pictures(2)
    recons[0] = 0.3
    values = pixel_correlation(recons, originals)
    assert values[0] == 0.0
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("size", [11, 40, 65])
def test_two_dimensional_ssim_is_scikit_images(size: int) -> None:
    recons, originals = pictures(3, size)
    expected = [skimage_ssim(grey(r), grey(o), **FIELD) for r, o in zip(recons, originals, strict=True)]
    assert structural_similarity(recons, originals).numpy() == pytest.approx(expected, abs=1e-12)


def test_column_wise_ssim_is_what_scikit_image_does_when_columns_are_taken_for_channels() -> None:
    recons, originals = pictures(3)
    expected = [
        skimage_ssim(grey(r), grey(o), channel_axis=-1, **FIELD) for r, o in zip(recons, originals, strict=True)
    ]
    assert structural_similarity(recons, originals, "columns").numpy() == pytest.approx(expected, abs=1e-12)


def test_the_two_kinds_of_ssim_are_different_numbers() -> None:
    recons, originals = pictures(3)
    difference = structural_similarity(recons, originals, "columns") - structural_similarity(recons, originals)
    assert difference.abs().min() > 0.01


def test_torchmetrics_ssim_averages_the_mirrored_border_too_and_equals_ours_once_that_is_cropped() -> None:
    recons, originals = pictures(3)
    weights = torch.tensor(GREY_WEIGHTS, dtype=torch.float64).view(1, 3, 1, 1)
    greys = [(pixels.double() * weights).sum(1, keepdim=True) for pixels in (recons, originals)]
    mean, full_map = structural_similarity_index_measure(
        *greys, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    ours = structural_similarity(recons, originals)
    cropped = full_map[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert cropped.numpy() == pytest.approx(ours.numpy(), abs=1e-9)
    assert (mean - ours).abs().min() > 1e-4


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11 x 11"):
        structural_similarity(torch.rand(1, 3, 10, 10), torch.rand(1, 3, 10, 10))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(12, 24))
def test_a_pairs_value_has_the_same_bits_in_any_batch(seed: int, size: int) -> None:
    recons, originals = pictures(3, size, seed)
    for metric in (pixel_correlation, structural_similarity):
        together = metric(recons, originals)
        alone = torch.cat([metric(recons[i : i + 1], originals[i : i + 1]) for i in range(3)])
        assert torch.equal(together, alone)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_both_metrics_are_symmetric_and_one_for_equal_pictures(seed: int) -> None:
    recons, originals = pictures(1, 20, seed)
    for metric in (pixel_correlation, structural_similarity):
        assert metric(recons, originals).item() == pytest.approx(metric(originals, recons).item(), abs=1e-12)
        assert metric(originals, originals).item() == pytest.approx(1.0, abs=1e-12)
