"""Samples <-> members of a tar: names, npy records of a fixed 128-byte header, PNG pictures, narrowing, checksums.

Keys hold no dot, because WebDataset splits a name at the first one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from nd_dist.errors import DataError

CHECKSUM = "xxh3_64"
NPY_HEADER_BYTES = 128
VOXELS = "voxels"
PICTURES = "img"
DTYPES: dict[str, Literal["<f2", "<f4"]] = {"float16": "<f2", "float32": "<f4"}


def int8_store(target: str) -> str:
    """Return the name of a target's int8 store, e.g. ``c8``."""
    return f"{target}8"


def stores_of(targets: Sequence[str], is_int8: bool) -> tuple[str, ...]:
    """Return the stores that hold some targets."""
    return tuple(int8_store(name) for name in targets) if is_int8 else tuple(targets)


def trial_key(subject: int, session: int, trial: int, image_id: int, repeat: int) -> str:
    """Return the sample key of a trial, e.g. ``s01_e01_t00000_i46002_r0``."""
    return f"s{subject:02d}_e{session:02d}_t{trial:05d}_i{image_id:05d}_r{repeat}"


def image_key(image_id: int) -> str:
    """Return the sample key of an image, e.g. ``i46002``."""
    return f"i{image_id:05d}"


def member_field(store: str) -> str:
    """Return the field of a store's members: ``voxels.npy``, ``c.npy``, ``png`` for pictures."""
    return "png" if store == PICTURES else f"{store}.npy"


def trial_shard_path(subject: int, session: int, only_test: bool = False) -> str:
    """Return the path of a session's shard, or of one of its test trials alone; its basename is unique."""
    return f"trials/subj{subject:02d}/nsd-s{subject:02d}-e{session:02d}{'-test' * only_test}.tar"


def image_shard_path(store: str, group: str, number: int) -> str:
    """Return the path of an image-keyed shard below the shards' folder; its basename is unique."""
    return f"features/{store}/nsd-{store}-{group}-{number:03d}.tar"


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the 128-byte npy 1.0 header of a C-ordered array.

    Raises:
        DataError: the shape does not fit (more than about seven dimensions).
    """
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}"
    length = NPY_HEADER_BYTES - 10
    if len(text) >= length:
        raise DataError("An array's npy header does not fit into 128 bytes.", found=f"{dtype} {shape}")
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode("ascii") + b"\n"


def narrow(values: npt.NDArray[np.floating], dtype: str, where: str) -> npt.NDArray[np.floating]:
    """Return ``values`` in the stored dtype, C-ordered.

    Raises:
        DataError: a value is not finite, or too large for the dtype.
    """
    if not np.isfinite(values).all():
        raise DataError("A value to be packed is not finite.", where=where, found=str(_first_bad(values)))
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=dtype)
    if not np.isfinite(stored).all():
        raise DataError(
            "A value is too large for the stored dtype.",
            where=where,
            expected=f"at most {np.finfo(np.dtype(dtype)).max}",
            found=float(np.abs(values).max()),
            todo="store float32 instead",
        )
    return stored


def _first_bad(values: npt.NDArray[np.floating]) -> float:
    """Return the first value that is not finite."""
    return float(values[~np.isfinite(values)].flat[0])


def encode_png(picture_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Return an RGB picture (H, W, 3), 0..255, as PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(picture_HWC, mode=None).save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def decode_png(content: bytes, where: str) -> npt.NDArray[np.uint8]:
    """Return the picture (H, W, 3), uint8, of PNG bytes.

    Raises:
        DataError: the bytes are not a PNG picture.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError("A packed picture cannot be decoded.", where=where, found=str(error)) from error


def checksum(record: memoryview) -> int:
    """Return the XXH3 checksum of a record's bytes, 0 .. 2**64-1, fast enough for every read.

    It finds accidents (a flipped byte, a cut or exchanged file, a wrong offset); against intent there is the sha256 of
    the shard.

    Args:
        record: (num_bytes,) single bytes, contiguous.
    """
    return xxhash.xxh3_64_intdigest(record)
