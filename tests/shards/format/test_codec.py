from __future__ import annotations

import io

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.codec import decode_png, encode_png, image_key, narrow, npy_header, trial_key


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
