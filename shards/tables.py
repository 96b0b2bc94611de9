"""The binary tables of an index: where every trial and every image's record lies, and its checksum.

Rows carry a checksum of the record (and the byte length for images, whose PNG records vary), so a reader knows at
once that what it read is what was packed.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError

TRAIN, TEST = 0, 1
ABSENT = 0xFFFFFFFF

# one row a trial, in (subject, trial) order; packed, 32 bytes
TRIAL_ROW = np.dtype(
    [
        ("subject", "u1"),
        ("session", "u1"),  # 1-based, as in NSD's file names
        ("repeat", "u1"),  # 0-based: how often the subject had seen the image before
        ("split", "u1"),  # TRAIN or TEST (an image that all subjects share)
        ("trial", "<u4"),  # 0-based in the subject
        ("image", "<u4"),  # 0-based image id
        ("shard", "<u4"),  # position in the index's list of shards
        ("offset", "<u8"),  # of the record's first byte in the tar (npy header skipped)
        ("checksum", "<u8"),  # of the record, see shards.checksum
    ]
)

# one row an image id, 0 .. num_images-1; packed, 24 bytes; shard ABSENT where the store lacks the image
IMAGE_ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("checksum", "<u8")])

Table = npt.NDArray[np.void]


def empty_image_table(num_images: int) -> Table:
    """Return a table of ``num_images`` absent images."""
    table = np.zeros(num_images, dtype=IMAGE_ROW)
    table["shard"] = ABSENT
    return table


def table_bytes(table: Table) -> bytes:
    """Return a table as the bytes of an npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(table), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_table(path: Path, dtype: np.dtype[np.void], rows: int, sha256: str) -> Table:
    """Return the table in ``path``, whose bytes must be those that were indexed.

    Raises:
        DataError: the file is missing, is not an npy file, or has other columns or rows than the index says.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its hash differs from the index")
        table = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(
            "A table of the index cannot be read.", where=str(path), found=str(error), todo="run `nd verify --repair`"
        ) from error
    if table.dtype != dtype or table.shape != (rows,):
        raise DataError(
            "A table of the index has another layout than the index says.",
            where=str(path),
            expected=f"{rows} rows of {dtype}",
            found=f"{table.shape} of {table.dtype}",
        )
    return np.asarray(table)
