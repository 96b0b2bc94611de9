from __future__ import annotations

import numpy as np
import pytest

from shards.format.checksum import checksum


def sum_of(content: np.ndarray) -> int:
    return checksum(content.data)


def record(num_bytes: int) -> np.ndarray:
    return (np.arange(num_bytes, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, 3244421341483603138),
        (3, 11656626615017960081),
        (8, 8777553300746549169),
        (4096, 9572937356618269207),
        (10007, 18377631201035760724),
    ],
)
def test_the_checksum_is_part_of_the_format_and_never_changes(num_bytes: int, expected: int) -> None:
    assert sum_of(record(num_bytes)) == expected


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 4095, 4096, 4097, 9001])
def test_every_flipped_bit_is_found(num_bytes: int) -> None:
    content = record(num_bytes)
    right = sum_of(content)
    for offset in range(num_bytes):
        for bit in (0, 7) if num_bytes > 9 else range(8):
            content[offset] ^= 1 << bit
            assert sum_of(content) != right
            content[offset] ^= 1 << bit


def test_pages_in_another_order_zeroed_pages_and_other_lengths_are_found() -> None:
    content = record(5 * 4096)
    exchanged = content.reshape(5, 4096)[[0, 2, 1, 3, 4]].reshape(-1)
    zeroed = content.copy()
    zeroed[4096:8192] = 0
    values = {sum_of(part) for part in (content, exchanged, zeroed, content[:-1], content[:4096], content[4096:])}
    assert len(values) == 6


def test_zeros_of_different_lengths_differ() -> None:
    assert len({sum_of(np.zeros(size, np.uint8)) for size in range(0, 9000, 100)}) == 90


def test_memory_that_is_not_aligned_gives_the_same() -> None:
    memory = np.zeros(20_001, dtype=np.uint8)
    memory[1:] = record(20_000)
    assert sum_of(memory[1:]) == sum_of(record(20_000))
