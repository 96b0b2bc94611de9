"""Writes volumes as gzipped NIfTI whose bytes depend on nothing but the volume."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt

from nd_dist.files import write_bytes

VOXEL_MM = 1.8


def write_nifti(
    path: Path,
    volume: npt.NDArray[np.int16] | npt.NDArray[np.float32] | npt.NDArray[np.uint8],
    voxel_mm: float = VOXEL_MM,
    slope: float | None = None,
) -> None:
    """Write a volume (X, Y, Z) or (X, Y, Z, T) without a date in its bytes.

    Args:
        path: Where to.
        volume: The values as they are stored.
        voxel_mm: Side of a voxel, millimetres.
        slope: What readers multiply by, stated in the header; None: nothing is stated.
    """
    image = nibabel.Nifti1Image(volume, np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0]))
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
