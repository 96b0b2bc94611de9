"""Real fMRI through our reading, masking, normalisation and voxel encoder (Haxby et al. 2001, one slice).

Legend: T volumes, V voxels, B blocks, K categories, H hidden width.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.signal import detrend
from torch import nn
from torch.nn import functional as F

from nd_dist.errors import DataError
from nd_dist.models.voxels import RidgeEncoder
from shards.packing import normalize
from shards.sources.betas import Roi, read_betas, read_header, read_labels

FOLDER = Path(__file__).parents[2] / "data" / "haxby2001"
SUBJECT, NUM_RUNS, HIDDEN = 1, 12, 64
CATEGORIES = ("bottle", "cat", "chair", "face", "house", "scissors", "scrambledpix", "shoe")


@pytest.fixture(scope="module")
def labels() -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Category and run of every volume."""
    rows = [line.split() for line in (FOLDER / "attributes_literal.txt").read_text().splitlines()]
    names, runs = zip(*rows, strict=True)
    return np.array(names), np.array(runs, dtype=np.int64)


@pytest.fixture(scope="module")
def blocks(
    labels: tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block means (B, V) of z-scored voxels, their categories (B,) and runs (B,)."""
    names_T, runs_T = labels
    bold_TV = read_betas(FOLDER / "bold.nii.gz", Roi.from_labels(read_labels(FOLDER / "mask.nii.gz")))
    edges = [0, *(np.flatnonzero((names_T[1:] != names_T[:-1]) | (runs_T[1:] != runs_T[:-1])) + 1), len(names_T)]
    means, categories, runs = [], [], []
    for run in range(NUM_RUNS):
        volumes = np.flatnonzero(runs_T == run)
        flat_TV = detrend(bold_TV[volumes], axis=0).astype(np.float32)
        moments = normalize.fit(flat_TV, np.ones(len(volumes), dtype=bool), f"run {run}")
        bold_TV[volumes], num_invalid = normalize.zscore(flat_TV, moments, ddof=0)
        assert num_invalid == 0
    for start, stop in pairwise(edges):
        if names_T[start] in CATEGORIES:
            means.append(bold_TV[start:stop].mean(axis=0))
            categories.append(CATEGORIES.index(names_T[start]))
            runs.append(runs_T[start])
    return torch.from_numpy(np.stack(means)), torch.tensor(categories), torch.tensor(np.array(runs))


def test_the_mask_selects_the_published_voxels_in_the_order_of_nibabel() -> None:
    roi = Roi.from_labels(read_labels(FOLDER / "mask.nii.gz"))
    header = read_header(FOLDER / "bold.nii.gz")
    assert (header.grid, header.num_trials, roi.num_voxels) == ((40, 20, 1), 1452, 530)
    import nibabel

    stored_XYZT = np.asarray(nibabel.load(FOLDER / "bold.nii.gz").dataobj)
    mask_XYZ = nibabel.load(FOLDER / "mask.nii.gz").get_fdata() > 0
    found_TV = read_betas(FOLDER / "bold.nii.gz", roi)
    np.testing.assert_allclose(found_TV * 300, stored_XYZT[mask_XYZ].T, rtol=1e-6)


def test_every_run_has_every_category_once(blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    means_BV, categories_B, runs_B = blocks
    assert means_BV.shape == (96, 530)
    assert sorted(zip(runs_B.tolist(), categories_B.tolist(), strict=True)) == [
        (run, category) for run in range(NUM_RUNS) for category in range(len(CATEGORIES))
    ]


def decoded(train_BV: torch.Tensor, categories_B: torch.Tensor, test_BV: torch.Tensor) -> torch.Tensor:
    """Train a voxel encoder with a linear head on category embeddings; return the nearest category of test blocks."""
    torch.manual_seed(0)
    encoder, head = RidgeEncoder({SUBJECT: train_BV.shape[1]}, HIDDEN), nn.Linear(HIDDEN, len(CATEGORIES))
    embeddings_KK = torch.eye(len(CATEGORIES))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=3.0)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(head(encoder({SUBJECT: train_BV})), embeddings_KK[categories_B]).backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cdist(head(encoder({SUBJECT: test_BV})), embeddings_KK).argmin(dim=1)


def share_right(blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor], categories_B: torch.Tensor) -> float:
    """Leave one run out, twelve times; return the share of blocks whose category was decoded."""
    means_BV, truth_B, runs_B = blocks
    right = 0
    for run in range(NUM_RUNS):
        is_test = runs_B == run
        found = decoded(means_BV[~is_test], categories_B[~is_test], means_BV[is_test])
        right += int((found == truth_B[is_test]).sum())
    return right / len(truth_B)


def test_a_voxel_encoder_with_a_linear_head_decodes_eight_categories_of_left_out_runs(
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    assert share_right(blocks, blocks[1]) >= 0.70


@pytest.mark.launch
def test_shuffled_categories_decode_to_chance(blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    shuffled_B = blocks[1][torch.randperm(len(blocks[1]), generator=torch.Generator().manual_seed(1))]
    assert share_right(blocks, shuffled_B) <= 0.30  # chance is 0.125 of 96 blocks; 0.30 is five standard errors above


def test_a_truncated_volume_series_is_named(tmp_path: Path) -> None:
    content = (FOLDER / "bold.nii.gz").read_bytes()
    cut = tmp_path / "bold.nii.gz"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"bold\.nii\.gz"):
        read_betas(cut, Roi.from_labels(read_labels(FOLDER / "mask.nii.gz")))
