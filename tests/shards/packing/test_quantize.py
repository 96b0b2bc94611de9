from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.index import Index
from shards.packing.quantize import channel_peaks, to_int8
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from shards.upkeep.verify import verify
from tests.shards.support import PooledExtractor, flip_byte, folder_bytes, make_config, pack_alone


@pytest.fixture(scope="module")
def int8_dir(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "shards"
    pack_alone(make_config(phantom_dir, folder, int8_targets=("z", "g02")))
    return folder


def test_a_channel_is_the_last_axis_of_tokens_and_the_first_of_a_latent() -> None:
    assert channel_peaks(np.ones((5, 77, 8))).shape == (1, 8)
    assert channel_peaks(np.ones((5, 4, 6, 7))).shape == (4, 1, 1)
    values = np.arange(24, dtype=np.float32).reshape(1, 4, 2, 3) - 12
    np.testing.assert_array_equal(channel_peaks(values).ravel(), [12, 6, 5, 11])


def test_the_error_of_every_value_is_at_most_half_a_step_of_its_channel() -> None:
    values = np.random.default_rng(0).normal(size=(200, 50, 32)).astype(np.float32)
    values[..., 3] *= 100  # an outlier channel must not cost the others anything
    scale = channel_peaks(values) / np.float32(127)
    restored = to_int8(values, scale) * scale
    assert (np.abs(restored - values) <= scale * 0.501).all()
    error = np.linalg.norm(restored - values, axis=(0, 1)) / np.linalg.norm(values, axis=(0, 1))
    assert error.max() < 0.013


def test_int8_stores_hold_the_targets_to_a_hundredth_and_prove_themselves(int8_dir: Path) -> None:
    reader = ShardReader(int8_dir)
    assert verify(int8_dir) == []
    assert {"z8", "g028"} <= reader.index.features.keys()
    ids = reader.images(2, "train")
    for name in ("z", "g02"):
        right, small = reader.targets(name, ids), reader.targets(f"{name}8", ids)
        assert np.abs(small - right).max() <= reader.index.scale(f"{name}8").max() * 0.51
        assert (small != right).any()
    half = {shard.path: shard.bytes for shard in reader.index.shards}
    assert half["features/z8/nsd-z8-s01-000.tar"] <= half["features/z/nsd-z-s01-000.tar"]


def test_a_stream_of_int8_targets_delivers_what_random_access_reads(int8_dir: Path) -> None:
    reader = ShardReader(int8_dir)
    config = StreamConfig(subjects=(1, 3), targets=("z", "g02"), samples_per_subject=5, seed=1, int8=True)
    with TrialStream(reader, config) as stream:
        for batch in islice(stream, 3):
            for name in ("z", "g02"):
                expected = reader.targets(f"{name}8", batch.image_id.tolist())
                np.testing.assert_array_equal(batch.targets[name].numpy(), expected)
    with pytest.raises(DataError, match="c8"):
        TrialStream(reader, StreamConfig((1,), ("c",), 5, 1, int8=True))


def test_adding_int8_later_runs_no_network_and_gives_the_same_bytes(
    phantom_dir: Path, int8_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    pack_alone(make_config(phantom_dir, folder))
    extractor = PooledExtractor()
    pack_alone(make_config(phantom_dir, folder, int8_targets=("z", "g02")), extractor)
    assert extractor.batches == []
    assert folder_bytes(folder) == folder_bytes(int8_dir)


def test_int8_shards_follow_when_more_images_change_the_scale(phantom_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    few = pack_alone(make_config(phantom_dir, folder, int8_targets=("g02",), subjects=(1,)))
    before = few.scale("g028").copy()
    more = pack_alone(make_config(phantom_dir, folder, int8_targets=("g02",)))
    assert (more.scale("g028") >= before).all()
    assert verify(folder) == []


def test_damage_of_an_int8_store_and_of_its_scale_is_found(int8_dir: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(int8_dir, tmp_path / "copy"))
    flip_byte(folder / "features/z8/nsd-z8-s01-000.tar", 700)
    assert {problem.shard for problem in verify(folder)} == {"features/z8/nsd-z8-s01-000.tar"}
    flip_byte(folder / "features/z8/nsd-z8-s01-000.tar", 700)
    flip_byte(folder / "index/z8_scale.npy", 130)
    assert {problem.shard for problem in verify(folder)} == {"index/z8_scale.npy"}
    with pytest.raises(DataError, match="hash differs"):
        ShardReader(folder).targets("z8", [ShardReader(folder).images(1, "test")[0]])


def test_targets_can_be_packed_in_single_precision(phantom_dir: Path, tmp_path: Path) -> None:
    pack_alone(make_config(phantom_dir, tmp_path / "shards", target_dtype="float32", int8_targets=("z",)))
    assert verify(tmp_path / "shards") == []
    index = Index.read(tmp_path / "shards")
    assert index.features["z"].dtype == "<f4"
    reader = ShardReader(tmp_path / "shards")
    from shards.sources.open import open_reader

    source = open_reader(make_config(phantom_dir, tmp_path / "x"))
    ids = reader.images(1, "test")
    expected = PooledExtractor().extract(source.pictures(ids), source.captions(ids), ids)["z"]
    np.testing.assert_array_equal(reader.targets("z", ids), expected)


def test_an_int8_store_of_a_target_that_is_not_packed_is_refused(phantom_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in data.targets"):
        make_config(phantom_dir, tmp_path, targets=("z",), int8_targets=("c",))
