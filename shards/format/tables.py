"""The binary tables of an index: where every trial and every image's record lies, and its checksum.

Rows carry a checksum of the record (and the byte length for images, whose PNG records vary), so a reader knows at
once that what it read is what was packed.
"""

from __future__ import annotations

import io
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from shards.places.store import Store, StoredFile, read_checked

TRAIN, TEST = 0, 1
UNUSED = 2  # in a named split: neither; never on disk in a row of trials
ABSENT = 0xFFFFFFFF

# one row a trial, in (subject, trial) order; packed, 32 bytes
TRIAL_ROW = np.dtype(
    [
        ("subject", "u1"),
        ("session", "u1"),  # 1-based
        ("repeat", "u1"),  # 0-based: how often the subject had seen the image before
        ("split", "u1"),  # TRAIN or TEST of the data set's own split
        ("trial", "<u4"),  # 0-based in the subject
        ("image", "<u4"),  # 0-based image id
        ("shard", "<u4"),  # position in the index's list of shards
        ("offset", "<u8"),  # of the record's first byte in the tar (npy header skipped)
        ("checksum", "<u8"),  # of the record, see shards.format.codec
    ]
)

# one row an image id, 0 .. num_images-1; packed, 24 bytes; shard ABSENT where the store lacks the image
IMAGE_ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("checksum", "<u8")])

# which images a subject trains and tests on in a named split (position in the index's list); packed, 7 bytes
SPLIT_ROW = np.dtype([("split", "u1"), ("subject", "u1"), ("part", "u1"), ("image", "<u4")])

# one row an image of a set (a group's position in the index's list, or the number of a set of duplicates)
MEMBER_ROW = np.dtype([("set", "<u4"), ("image", "<u4")])

Table = npt.NDArray[np.void]
Scalar = TypeVar("Scalar", bound=np.generic)


def empty_image_table(num_images: int) -> Table:
    """Return a table of ``num_images`` absent images."""
    table = np.zeros(num_images, dtype=IMAGE_ROW)
    table["shard"] = ABSENT
    return table


def table_bytes(table: npt.NDArray[Any]) -> bytes:
    """Return a table, or any array, as the bytes of an npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(table), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_table(store: Store, file: StoredFile, num_rows: int, dtype: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
    """Return a table (rows on its first axis), whose bytes must be those that were indexed.

    Raises:
        DataError: the file is missing or damaged, or has other columns or rows than the index says.
    """
    content = read_checked(store, file)
    try:
        table = np.atleast_1d(np.load(io.BytesIO(content), allow_pickle=False))
    except (ValueError, EOFError, SyntaxError):
        table = np.empty(0)
    if table.dtype != dtype or len(table) != num_rows:
        raise DataError(
            "A table of the index has another layout than the index says.",
            where=f"{store.place}/{file.path}",
            expected=f"{num_rows} rows of {dtype}",
            found=f"{table.shape} of {table.dtype}",
        )
    return np.asarray(table)
