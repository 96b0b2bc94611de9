from __future__ import annotations

import io

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.codec import checksum, decode_png, encode_png, image_key, narrow, npy_header, trial_key


@pytest.mark.parametrize(
    ("dtype", "shape"), [("<f2", (15724,)), ("<f4", (77, 768)), ("|i1", (4, 64, 64)), ("<f2", ())]
)
def test_the_header_is_128_bytes_and_numpy_reads_it(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    header = npy_header(dtype, shape)
    assert len(header) == 128
    loaded = np.load(io.BytesIO(header + values.tobytes()), allow_pickle=False)
    assert loaded.dtype == dtype
    assert (loaded == values).all()


def test_a_shape_that_does_not_fit_the_header_is_refused() -> None:
    with pytest.raises(DataError):
        npy_header("<f2", (1000,) * 20)


def test_keys_hold_no_dot_because_webdataset_splits_there() -> None:
    assert trial_key(1, 1, 0, 46002, 0) == "s01_e01_t00000_i46002_r0"
    assert image_key(46002) == "i46002"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(DataError, match="c of image 3"):
        narrow(np.array([0.0, bad]), "<f2", "c of image 3")


def test_a_value_too_large_for_half_precision_is_refused_and_fits_single_precision() -> None:
    values = np.array([70_000.0])
    with pytest.raises(DataError, match="65504"):
        narrow(values, "<f2", "z")
    assert narrow(values, "<f4", "z")[0] == 70_000.0


def test_pictures_survive_png_bit_by_bit() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert (decode_png(encode_png(picture), "i1") == picture).all()


def test_bytes_that_are_no_png_are_an_error_that_names_the_picture() -> None:
    with pytest.raises(DataError, match="i00007"):
        decode_png(b"GIF89a", "i00007")


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
