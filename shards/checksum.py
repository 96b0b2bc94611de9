"""The checksum of a record, fast enough to be checked on every read: XXH3, 64 bits.

It finds accidents (a flipped byte, a cut or exchanged file, a wrong offset); against intent there is the sha256 of the
shard.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

CHECKSUM = "xxh3_64"
# xxhash lets go of the interpreter for more bytes than this. Reader threads that hand it over at every record lose
# more time than hashing takes, some microseconds; so a record is hashed in pieces, which gives the same sum.
_PIECE_BYTES = 64 * 1024


def checksum(record: npt.NDArray[np.uint8]) -> int:
    """Return the checksum of a record's bytes, 0 .. 2**64-1.

    Args:
        record: (num_bytes,) contiguous bytes.
    """
    content = record.data
    if len(content) <= _PIECE_BYTES:
        return xxhash.xxh3_64_intdigest(content)
    digest = xxhash.xxh3_64(content[:_PIECE_BYTES])
    for start in range(_PIECE_BYTES, len(content), _PIECE_BYTES):
        digest.update(content[start : start + _PIECE_BYTES])
    return digest.intdigest()
