"""The checksum of a record, fast enough to be checked on every read (several times faster than zlib's plain crc32).

The record is cut into pages of 4096 bytes; the 64-bit words of each page are summed, and the sums are summed again,
each times an odd weight of its position, all modulo 2**64. So a change within one 8-byte word is always found (an
odd weight has an inverse), and other damage, or a page in a wrong place, is missed with a chance of about 2**-64. What
it cannot see are words exchanged inside one page: no disk or network does that, and the sha256 of the shard sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nd_dist.seeds import splitmix64

PAGE_WORDS = 512
_WORD = np.dtype("<u8")
_MASK = 2**64 - 1


def checksum(record: npt.NDArray[np.uint8]) -> int:
    """Return the checksum of a record's bytes, 0 .. 2**64-1.

    Args:
        record: (num_bytes,) contiguous bytes.
    """
    plan = _plan(len(record))
    total = plan.constant
    if plan.num_pages:
        pages = record[: plan.page_end].view(_WORD).reshape(plan.num_pages, PAGE_WORDS)
        total += int(np.dot(np.add.reduce(pages, axis=1), plan.page_weights))
    if plan.word_end > plan.page_end:
        total += int(np.add.reduce(record[plan.page_end : plan.word_end].view(_WORD))) * plan.tail_weight
    if plan.word_end < len(record):
        total += int.from_bytes(record[plan.word_end :].tobytes(), "little") * plan.rest_weight
    return total & _MASK


@dataclass(frozen=True)
class _Plan:
    """What the checksum of a record of one length needs: where its pages and words end, and the odd weights."""

    num_pages: int
    page_end: int
    word_end: int
    page_weights: npt.NDArray[np.uint64]
    tail_weight: int
    rest_weight: int
    constant: int


@lru_cache(maxsize=64)
def _plan(num_bytes: int) -> _Plan:
    """Return the plan for records of ``num_bytes``: one weight a page, one for the words after the last whole page,
    one for the bytes after the last whole word, and one for the length."""
    num_words = num_bytes // 8
    num_pages = num_words // PAGE_WORDS
    weights = splitmix64(np.arange(num_pages + 3, dtype=np.uint64)) | np.uint64(1)
    tail_weight, rest_weight, length_weight = (int(weight) for weight in weights[num_pages:])
    return _Plan(
        num_pages=num_pages,
        page_end=num_pages * PAGE_WORDS * 8,
        word_end=num_words * 8,
        page_weights=weights[:num_pages],
        tail_weight=tail_weight,
        rest_weight=rest_weight,
        constant=num_bytes * length_weight,
    )
