from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from nd_dist.config import RemoteConfig
from nd_dist.errors import DataError
from shards.format.codec import trial_shard_path
from shards.format.index import Index
from shards.reading.as_webdataset import as_webdataset
from shards.reading.reader import ShardReader
from tests.support.file_server import FileServer


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_every_trial_of_it_once_with_voxels_and_targets(packed_dir: Path, split: str) -> None:
    reader = ShardReader(packed_dir)
    samples = list(as_webdataset(reader.index, split, targets=("z", "c")))  # type: ignore[arg-type]
    expected = reader.trials[reader.trials["split"] == (split == "test")]
    assert [(s["subject"], s["trial"]) for s in samples] == [(r["subject"], r["trial"]) for r in expected]
    for sample, row in zip(samples, expected, strict=True):
        record = np.empty((1, reader.num_voxels[sample["subject"]]), dtype="<f2")
        reader.read_voxels(row[None], record)
        np.testing.assert_array_equal(sample["voxels.npy"], record[0])
        assert (sample["session"], sample["image_id"], sample["repeat"]) == tuple(
            int(row[name]) for name in ("session", "image", "repeat")
        )
    np.testing.assert_array_equal(samples[3]["z"], reader.targets("z", [samples[3]["image_id"]])[0])


def test_webdatasets_own_steps_follow_and_shards_can_be_shuffled(packed_dir: Path) -> None:
    index = Index.read(packed_dir)
    plain = [sample["__key__"] for sample in as_webdataset(index, "train", subjects=[1])]
    shuffled = [
        sample["__key__"] for sample in as_webdataset(index, "train", subjects=[1], shuffle_seed=3).shuffle(20)
    ]
    assert sorted(shuffled) == sorted(plain)
    assert shuffled != plain
    assert all(key.startswith("s01_") for key in plain)
    [pair] = as_webdataset(index, "train", subjects=[1], targets=["z"]).to_tuple("voxels.npy", "z").slice(1)
    assert pair[1].shape == (3, 4, 4)


def test_dataloader_workers_share_the_shards(packed_dir: Path) -> None:
    index = Index.read(packed_dir)
    alone = {sample["__key__"] for sample in as_webdataset(index, "train")}
    loader = DataLoader(as_webdataset(index, "train", targets=["z"]), batch_size=None, num_workers=2)
    keys = [sample["__key__"] for sample in loader]
    assert len(keys) == len(set(keys))
    assert set(keys) == alone


def test_a_urls_shards_come_through_the_cache_also_in_workers(packed_dir: Path, tmp_path: Path) -> None:
    with FileServer(packed_dir) as server:
        index = Index.read(server.url, RemoteConfig(cache_dir=tmp_path / "cache"))
        loader = DataLoader(as_webdataset(index, "test", targets=["z"]), batch_size=None, num_workers=2)
        keys = {sample["__key__"] for sample in loader}
        assert keys == {sample["__key__"] for sample in as_webdataset(Index.read(packed_dir), "test")}
        assert set(server.count().values()) == {1}


@pytest.mark.parametrize("size", [0, 512, 1024, 3000, -512])
def test_a_cut_shard_is_an_error_where_stock_webdataset_ends_without_a_word(packed_copy: Path, size: int) -> None:
    path = packed_copy / trial_shard_path(2, 2)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut or damaged"):
        list(as_webdataset(Index.read(packed_copy), "train"))


def test_a_flipped_header_bit_never_hides_the_rest_of_a_shard(packed_copy: Path) -> None:
    index = Index.read(packed_copy)
    row = index.trials[(index.trials["subject"] == 2) & (index.trials["session"] == 2)][5]
    path = packed_copy / trial_shard_path(2, 2)
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) - 128 - 512 + 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut or damaged"):
        list(as_webdataset(index, "train"))


@pytest.mark.parametrize("damage", ["flipped byte", "not a number", "exchanged", "appended"])
def test_a_value_that_is_not_what_was_packed_is_never_passed_on(packed_copy: Path, damage: str) -> None:
    index = Index.read(packed_copy)
    rows = index.trials[(index.trials["subject"] == 1) & (index.trials["session"] == 1)]
    path = packed_copy / trial_shard_path(1, 1)
    content = bytearray(path.read_bytes())
    first, second = int(rows["offset"][3]), int(rows["offset"][4])
    size = index.num_voxels[1] * 2
    if damage == "flipped byte":
        content[first + 7] ^= 1
    elif damage == "not a number":
        content[first : first + 2] = np.array(np.nan, dtype="<f2").tobytes()
    elif damage == "exchanged":
        content[first : first + size], content[second : second + size] = (
            content[second : second + size],
            content[first : first + size],
        )
    else:
        content += bytes(10_240)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cut or damaged(.|\n)*nsd-s01-e01"):
        list(as_webdataset(Index.read(packed_copy), "train"))


def test_a_subject_or_target_that_was_not_packed_is_said_at_once(packed_dir: Path) -> None:
    index = Index.read(packed_dir)
    with pytest.raises(DataError, match=r"\[7\]"):
        as_webdataset(index, "train", subjects=[7])
    with pytest.raises(DataError, match="g12"):
        as_webdataset(index, "train", targets=["g12"])
