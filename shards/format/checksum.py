"""The checksum of a record, fast enough to be checked on every read: XXH3, 64 bits.

It finds accidents (a flipped byte, a cut or exchanged file, a wrong offset); against intent there is the sha256 of the
shard.
"""

from __future__ import annotations

import xxhash

CHECKSUM = "xxh3_64"


def checksum(record: memoryview) -> int:
    """Return the checksum of a record's bytes, 0 .. 2**64-1.

    Args:
        record: (num_bytes,) single bytes, contiguous.
    """
    return xxhash.xxh3_64_intdigest(record)
