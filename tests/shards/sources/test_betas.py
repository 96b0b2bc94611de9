from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import nibabel
import numpy as np
import numpy.typing as npt
import pytest

from nd_dist.errors import DataError
from shards.sources.betas import Roi, read_betas, read_header, read_labels

GRID = (5, 6, 7)
TRIALS = 9


@pytest.fixture
def volumes() -> npt.NDArray[np.int16]:
    return np.random.default_rng(3).integers(-3000, 3000, (*GRID, TRIALS), dtype=np.int16)


@pytest.fixture
def labels() -> npt.NDArray[np.float32]:
    return np.random.default_rng(4).integers(-1, 4, GRID).astype(np.float32)


def write_nifti(path: Path, values: npt.NDArray[np.generic], slope: float | None = None) -> Path:
    image = nibabel.Nifti1Image(values, np.eye(4))
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
    return path


def write_hdf5(path: Path, values: npt.NDArray[np.generic]) -> Path:
    """As MATLAB's h5write does: axes reversed, a chunk holds all trials of a voxel."""
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=values.transpose(3, 2, 1, 0), chunks=(values.shape[3], 1, 1, 1))
    return path


def test_nifti_and_hdf5_give_the_same_voxels_as_plain_indexing(
    tmp_path: Path, volumes: npt.NDArray[np.int16], labels: npt.NDArray[np.float32]
) -> None:
    roi = Roi.from_labels(labels)
    expected_TV = volumes[labels > 0].T / np.float32(300)
    for path in (
        write_nifti(tmp_path / "a.nii.gz", volumes),
        write_nifti(tmp_path / "a.nii", volumes),
        write_hdf5(tmp_path / "a.hdf5", volumes),
    ):
        betas_TV = read_betas(path, roi)
        assert betas_TV.dtype == np.float32
        np.testing.assert_array_equal(betas_TV, expected_TV, err_msg=path.name)


def test_zero_and_negative_labels_are_outside_and_all_positive_labels_inside(labels: npt.NDArray[np.float32]) -> None:
    assert Roi.from_labels(labels).num_voxels == int((labels > 0).sum()) > int((labels == 1).sum())


def test_runs_along_x_cover_every_voxel_once_and_stay_in_their_line(labels: npt.NDArray[np.float32]) -> None:
    roi = Roi.from_labels(labels)
    coordinates = np.argwhere(labels > 0)
    seen = []
    for z, y, x_start, x_stop, voxels in roi.x_runs():
        assert coordinates[voxels].tolist() == [[x, y, z] for x in range(x_start, x_stop)]
        seen += voxels.tolist()
    assert sorted(seen) == list(range(roi.num_voxels))


@pytest.mark.parametrize("write", [write_nifti, write_hdf5])
def test_floating_point_betas_are_percent_already_and_keep_their_nan(
    tmp_path: Path, write: object, volumes: npt.NDArray[np.int16], labels: npt.NDArray[np.float32]
) -> None:
    values = volumes.astype(np.float32) / 300
    values[2, 3, 4, 5] = np.nan
    labels[2, 3, 4] = 1
    path = write(tmp_path / ("a.hdf5" if write is write_hdf5 else "a.nii.gz"), values)  # type: ignore[operator]
    np.testing.assert_array_equal(read_betas(path, Roi.from_labels(labels)), values[labels > 0].T)


def test_a_scale_in_the_nifti_header_replaces_the_default_scale(
    tmp_path: Path, volumes: npt.NDArray[np.int16], labels: npt.NDArray[np.float32]
) -> None:
    image = nibabel.Nifti1Image(volumes, np.eye(4))
    content = bytearray(image.to_bytes())
    content[112:116] = np.float32(0.5).tobytes()  # scl_slope
    (tmp_path / "a.nii").write_bytes(bytes(content))
    betas_TV = read_betas(tmp_path / "a.nii", Roi.from_labels(labels))
    np.testing.assert_array_equal(betas_TV, volumes[labels > 0].T * np.float32(0.5))


def test_the_header_tells_grid_and_trials_without_reading_betas(
    tmp_path: Path, volumes: npt.NDArray[np.int16]
) -> None:
    for path in (write_nifti(tmp_path / "a.nii.gz", volumes), write_hdf5(tmp_path / "a.hdf5", volumes)):
        header = read_header(path)
        assert (header.grid, header.num_trials) == (GRID, TRIALS)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(
    tmp_path: Path, share: float, volumes: npt.NDArray[np.int16], labels: npt.NDArray[np.float32]
) -> None:
    roi = Roi.from_labels(labels)
    for path in (
        write_nifti(tmp_path / "a.nii.gz", volumes),
        write_nifti(tmp_path / "a.nii", volumes),
        write_hdf5(tmp_path / "a.hdf5", volumes),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=path.name):
            read_betas(path, roi)


def test_a_flipped_byte_in_a_gzipped_file_is_an_error(
    tmp_path: Path, volumes: npt.NDArray[np.int16], labels: npt.NDArray[np.float32]
) -> None:
    raw = nibabel.Nifti1Image(volumes, np.eye(4)).to_bytes()
    content = bytearray(gzip.compress(raw, compresslevel=0))  # stored, so that the flip is not a broken code
    content[len(content) // 2] ^= 0x10
    (tmp_path / "a.nii.gz").write_bytes(bytes(content))
    with pytest.raises(DataError, match="CRC"):
        read_betas(tmp_path / "a.nii.gz", Roi.from_labels(labels))


def test_a_missing_file_and_another_grid_are_named(tmp_path: Path, volumes: npt.NDArray[np.int16]) -> None:
    with pytest.raises(DataError, match="missing"):
        read_labels(tmp_path / "roi.nii.gz")
    path = write_nifti(tmp_path / "a.nii.gz", volumes)
    with pytest.raises(DataError, match="different grids"):
        read_betas(path, Roi.from_labels(np.ones((4, 6, 7))))


def test_three_dimensional_betas_are_refused(tmp_path: Path, volumes: npt.NDArray[np.int16]) -> None:
    with pytest.raises(DataError, match="four axes"):
        read_header(write_nifti(tmp_path / "a.nii.gz", volumes[..., 0]))


def test_a_file_of_another_kind_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nii", "a.hdf5"):
        (tmp_path / name).write_bytes(b"no such format" * 100)
        with pytest.raises(DataError, match=name):
            read_header(tmp_path / name)


def test_an_hdf5_without_betas_is_an_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(DataError, match="a.hdf5"):
        read_header(tmp_path / "a.hdf5")
