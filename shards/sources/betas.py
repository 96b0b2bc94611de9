"""Reads the voxels of an ROI from one session's betas, NIfTI or HDF5, without holding the brain in memory.

The two formats order their axes differently: NIfTI is (X, Y, Z, T) with X fastest, and the HDF5 that MATLAB wrote
shows in h5py as (T, Z, Y, X). Both lie in memory as Z, Y, X with X fastest, so one flat index serves both. A NIfTI
header's own scale is applied; what integers without one mean, the data set's reader knows (NSD: percent x 300).

Shape suffixes: T trials, V voxels of the ROI, X, Y, Z the brain grid.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import nibabel
import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.sources.files import open_hdf5, reading

BETA_SCALE = 300.0  # NSD manual: int16 betas are percent signal change x 300
HDF5_DATASET = "betas"
PROBED_VOXELS = 3


@dataclass(frozen=True)
class Roi:
    """The voxels of an ROI.

    Args:
        grid: Brain grid (X, Y, Z).
        flat: (V,) index of every voxel into a volume that is flattened with X fastest; voxels are numbered as
            ``betas_XYZT[mask_XYZ]`` numbers them (Z fastest), the order that published code uses.
    """

    grid: tuple[int, int, int]
    flat: npt.NDArray[np.int64]

    @staticmethod
    def from_labels(labels_XYZ: npt.NDArray[np.floating]) -> Roi:
        """Return the voxels with a positive label (zero and negative labels are outside)."""
        x, y, z = np.nonzero(labels_XYZ > 0)
        size_x, size_y, size_z = labels_XYZ.shape
        return Roi((size_x, size_y, size_z), (z * size_y + y) * size_x + x)

    @property
    def num_voxels(self) -> int:
        """Number of voxels V."""
        return len(self.flat)

    def x_runs(self) -> Iterator[tuple[int, int, int, int, npt.NDArray[np.int64]]]:
        """Yield (z, y, x_start, x_stop, voxels): runs along X of neighbouring voxels, and which voxels they are."""
        size_x, size_y, _ = self.grid
        voxels = np.argsort(self.flat, kind="stable")
        flat = self.flat[voxels]
        is_break = (np.diff(flat) != 1) | (flat[1:] % size_x == 0)
        for run in np.split(np.arange(len(flat)), np.flatnonzero(is_break) + 1):
            first = int(flat[run[0]])
            x, z_y = first % size_x, first // size_x
            yield z_y // size_y, z_y % size_y, x, x + len(run), voxels[run]


@dataclass(frozen=True)
class BetasHeader:
    """Shape of a betas file: brain grid (X, Y, Z) and number of trials."""

    grid: tuple[int, int, int]
    num_trials: int


def read_labels(path: Path) -> npt.NDArray[np.floating]:
    """Return an ROI volume's labels (X, Y, Z).

    Raises:
        DataError: the file is missing or damaged.
    """
    with reading(path):
        return np.asarray(nibabel.load(path).get_fdata(dtype=np.float32))


def read_affine(path: Path) -> npt.NDArray[np.float64]:
    """Return where the voxels of a NIfTI file lie, (4, 4), millimetres.

    Raises:
        DataError: the file is missing or damaged.
    """
    with reading(path):
        return np.asarray(nibabel.load(path).affine, dtype=np.float64)


def read_header(path: Path) -> BetasHeader:
    """Return the shape of a betas file without reading betas.

    Raises:
        DataError: the file is missing, damaged or not four-dimensional.
    """
    with reading(path):
        if path.suffix == ".hdf5":
            with open_hdf5(path) as file:
                shape = tuple(reversed(file[HDF5_DATASET].shape))
        else:
            shape = tuple(nibabel.load(path).shape)
    if len(shape) != 4:
        raise DataError("Betas must have four axes.", where=str(path), expected="X, Y, Z, trials", found=shape)
    return BetasHeader((int(shape[0]), int(shape[1]), int(shape[2])), int(shape[3]))


def read_probe(path: Path, roi: Roi) -> bytes:
    """Return a little of a betas file, by which two equal deliveries are known without reading them; maybe nothing.

    Raises:
        DataError: the file is missing or damaged.
    """
    with reading(path):
        if path.suffix == ".hdf5":  # a chunk holds all trials of a voxel
            x, z_y = roi.flat % roi.grid[0], roi.flat // roi.grid[0]
            with open_hdf5(path) as file:
                chosen = np.linspace(0, roi.num_voxels - 1, PROBED_VOXELS).astype(int)
                parts = [file[HDF5_DATASET][:, z_y[v] // roi.grid[1], z_y[v] % roi.grid[1], x[v]] for v in chosen]
        else:
            image = nibabel.load(path)
            with _open_maybe_gzip(path) as stream:
                stream.read(int(image.dataobj.offset))
                content = stream.read(int(np.prod(roi.grid)) * image.header.get_data_dtype().itemsize)
            parts = [np.frombuffer(content, dtype=np.uint8)]
    return b"".join(part.tobytes() for part in parts if len(np.unique(part)) > 1)


def read_betas(path: Path, roi: Roi, integer_scale: float | None = BETA_SCALE) -> npt.NDArray[np.float32]:
    """Return the ROI's betas (T, V) in the data set's unit.

    Args:
        path: NIfTI or HDF5.
        roi: Which voxels.
        integer_scale: What integers are divided by where the file states no scale; None: such a file is refused.

    Raises:
        DataError: the file is missing, truncated or damaged, its grid is not the ROI's, or its unit is not known.
    """
    header = read_header(path)
    if header.grid != roi.grid:
        raise DataError("Betas and ROI have different grids.", where=str(path), expected=roi.grid, found=header.grid)
    read = _read_hdf5 if path.suffix == ".hdf5" else _read_nifti
    with reading(path):
        betas_TV, is_scaled = read(path, roi, header.num_trials)
    if is_scaled:
        return betas_TV
    if integer_scale is None:
        raise DataError(
            "Betas are whole numbers without a scale.",
            where=str(path),
            expected="floating point, or scl_slope in the header",
            todo="download the file again, or report what it holds",
        )
    betas_TV /= np.float32(integer_scale)
    return betas_TV


def _read_hdf5(path: Path, roi: Roi, num_trials: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Read run by run along X: NSD's chunks hold all trials of one voxel, so only the ROI's chunks are touched.

    Returns:
        Betas (T, V), and whether they are in their unit already (no integers).
    """
    with open_hdf5(path) as file:
        dataset = file[HDF5_DATASET]
        betas_TV = np.empty((num_trials, roi.num_voxels), dtype=np.float32)
        for z, y, x_start, x_stop, voxels in roi.x_runs():
            betas_TV[:, voxels] = dataset[:, z, y, x_start:x_stop]
        is_scaled = not np.issubdtype(dataset.dtype, np.integer)
    return betas_TV, is_scaled


def _read_nifti(path: Path, roi: Roi, num_trials: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Read volume by volume to the end of the file, so that gzip checks its sum and memory holds one volume.

    Returns:
        Betas (T, V), and whether they are in their unit already (no integers, or scaled as the header says).
    """
    image = nibabel.load(path)
    dtype, offset = image.header.get_data_dtype(), int(image.dataobj.offset)
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    volume_bytes = int(np.prod(roi.grid)) * dtype.itemsize
    betas_TV = np.empty((num_trials, roi.num_voxels), dtype=np.float32)
    with _open_maybe_gzip(path) as stream:
        stream.read(offset)
        for trial in range(num_trials):
            content = stream.read(volume_bytes)
            if len(content) != volume_bytes:
                raise EOFError(f"ends in trial {trial} of {num_trials}")
            betas_TV[trial] = np.frombuffer(content, dtype=dtype)[roi.flat]
        while stream.read(1 << 20):
            pass
    if (slope, intercept) != (1.0, 0.0):  # the header states a scale of its own
        return betas_TV * np.float32(slope) + np.float32(intercept), True
    return betas_TV, not np.issubdtype(dtype, np.integer)


@contextmanager
def _open_maybe_gzip(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file's (uncompressed) bytes."""
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as unzipped:
            yield cast(IO[bytes], unzipped)
    else:
        with open(path, "rb") as stream:
            yield stream
