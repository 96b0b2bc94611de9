"""The checksum of a record, fast enough to be checked on every read (several times faster than zlib's plain crc32).

The record is cut into pages of 4096 bytes; the 64-bit words of each page are summed, and the sums are summed again,
each times an odd weight of its position, all modulo 2**64. So a change within one 8-byte word is always found (an
odd weight has an inverse), and other damage, or a page in a wrong place, is missed with a chance of about 2**-64. What
it cannot see are words exchanged inside one page: no disk or network does that, and the sha256 of the shard sees it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nd_dist.seeds import splitmix64

PAGE_WORDS = 512


def checksum(record: npt.NDArray[np.uint8]) -> int:
    """Return the checksum of a record's bytes, 0 .. 2**64-1.

    Args:
        record: (num_bytes,) contiguous bytes.
    """
    num_words = len(record) // 8
    num_pages = num_words // PAGE_WORDS
    words = record[: num_words * 8].view("<u8")
    whole = words[: num_pages * PAGE_WORDS]
    sums = np.empty(num_pages + 3, dtype=np.uint64)
    np.add.reduce(whole.reshape(num_pages, PAGE_WORDS), axis=1, out=sums[:num_pages])
    sums[num_pages] = np.add.reduce(words[len(whole) :])
    sums[num_pages + 1] = int.from_bytes(record[num_words * 8 :].tobytes(), "little")
    sums[num_pages + 2] = len(record)
    return int(np.dot(sums, _weights(num_pages + 3)))


@lru_cache(maxsize=64)
def _weights(count: int) -> npt.NDArray[np.uint64]:
    """Return ``count`` odd weights."""
    return splitmix64(np.arange(count, dtype=np.uint64)) | np.uint64(1)
