from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.codec import image_shard_path, trial_shard_path
from shards.format.index import Index, index_id
from shards.reading.reader import ShardReader
from shards.sources.open import open_reader
from tests.shards.support import PooledExtractor, flip_byte, make_config


@pytest.fixture
def reader(packed_dir: Path) -> ShardReader:
    return ShardReader(packed_dir)


def test_voxels_are_the_mean_of_z_scored_repeats(reader: ShardReader, phantom_dir: Path) -> None:
    source = open_reader(make_config(phantom_dir, phantom_dir))
    for subject in (1, 2):
        design = source.design(subject)
        normalized = np.zeros((design.num_trials, design.num_voxels))
        for session in design.sessions:
            trials = design.trials_of(session)
            betas = source.read_session(subject, session).astype(np.float64)
            fitted = betas[~design.is_test[trials]]
            std = fitted.std(axis=0)
            is_valid = (std > 1e-6) & (np.ptp(betas, axis=0) > 0)
            normalized[trials] = np.where(is_valid, (betas - fitted.mean(axis=0)) / np.where(is_valid, std, 1), 0)
        for split in ("train", "test"):
            ids = reader.images(subject, split)
            assert ids == sorted(set(design.image_id[design.is_test == (split == "test")].tolist()))
            expected = np.stack([normalized[design.image_id == image_id].mean(axis=0) for image_id in ids])
            np.testing.assert_allclose(reader.voxels(subject, ids), expected, atol=4e-3)


def test_targets_and_pictures_are_the_extractors_and_the_data_sets(reader: ShardReader, phantom_dir: Path) -> None:
    source = open_reader(make_config(phantom_dir, phantom_dir))
    ids = reader.images(1, "test")
    pictures = source.pictures(ids)
    assert (reader.pictures(ids) == pictures).all()
    expected = PooledExtractor().extract(pictures, source.captions(ids), ids)
    for name, values in expected.items():
        np.testing.assert_array_equal(reader.targets(name, ids), values.astype(np.float16).astype(np.float32))


def test_the_order_asked_for_is_the_order_given(reader: ShardReader) -> None:
    ids = reader.images(3, "train")[:5]
    assert (reader.voxels(3, ids[::-1]) == reader.voxels(3, ids)[::-1]).all()
    assert reader.voxels(3, []).shape == (0, reader.num_voxels[3])


def test_two_repeats_are_averaged_plainly_or_as_released(reader: ShardReader) -> None:
    sessions = range(1, reader.index.subjects[3].sessions)
    trials = reader.trials_of(3, sessions)
    ids, counts = np.unique(trials["image"], return_counts=True)
    pair = int(ids[counts == 2][0])
    stored_RV = np.empty((2, reader.num_voxels[3]), dtype=np.float16)
    reader.read_voxels(trials[trials["image"] == pair], stored_RV)
    a, b = stored_RV.astype(np.float64)
    np.testing.assert_allclose(reader.voxels(3, [pair], sessions)[0], (a + b) / 2, atol=1e-6)
    np.testing.assert_allclose(
        reader.voxels(3, [pair], sessions, two_repeats="official")[0], (2 * a + b) / 3, atol=1e-6
    )
    others = [int(image_id) for image_id in ids[counts != 2]]
    assert (reader.voxels(3, others, sessions, two_repeats="official") == reader.voxels(3, others, sessions)).all()


def test_what_was_not_packed_is_said(reader: ShardReader) -> None:
    unseen = next(i for i in reader.images(1, "test") if i not in reader.images(2, "test"))
    with pytest.raises(DataError, match=f"did not see image {unseen}"):
        reader.voxels(2, [unseen])
    with pytest.raises(DataError, match="Subject 8 was not packed"):
        reader.images(8, "test")
    with pytest.raises(DataError, match="no store 'g04'"):
        reader.targets("g04", [0])
    with pytest.raises(DataError, match="holds no image"):
        reader.pictures(reader.images(1, "train")[:1])
    with pytest.raises(DataError, match="holds no image"):
        reader.targets("z", [10**6])


def test_a_flipped_byte_in_a_record_is_an_error_that_names_shard_sample_and_offset(packed_copy: Path) -> None:
    reader = ShardReader(packed_copy)
    row = reader.trials[reader.trials["subject"] == 1][0]
    image_id = int(row["image"])
    flip_byte(packed_copy / trial_shard_path(1, 1), int(row["offset"]) + 5)
    with pytest.raises(DataError) as caught:
        reader.voxels(1, [image_id])
    message = str(caught.value)
    assert "nsd-s01-e01.tar" in message
    assert f"s01_e01_t00000_i{image_id:05d}_r0" in message
    assert f"offset {int(row['offset'])}" in message


def test_every_flipped_byte_of_a_shard_is_an_error_or_leaves_the_samples_right(packed_copy: Path) -> None:
    reader = ShardReader(packed_copy)
    rows = reader.trials[(reader.trials["subject"] == 1) & (reader.trials["session"] == 1)]
    path = packed_copy / trial_shard_path(1, 1)
    size, num_bytes = path.stat().st_size, reader.num_voxels[1] * 2
    record = np.empty(reader.num_voxels[1], dtype="<f2")

    def read_all() -> list[bytes]:
        contents = []
        for row in rows:
            reader.read_voxels(row[None], record[None])
            contents.append(record.tobytes())
        return contents

    right = read_all()
    for offset in range(0, size, 13):
        is_record = any(int(row["offset"]) <= offset < int(row["offset"]) + num_bytes for row in rows)
        flip_byte(path, offset)
        if is_record:
            with pytest.raises(DataError, match="checksum"):
                read_all()
        else:
            assert read_all() == right
        flip_byte(path, offset)


def test_a_cut_or_missing_shard_is_an_error(packed_copy: Path) -> None:
    path = packed_copy / image_shard_path("z", "shared", 0)
    content = path.read_bytes()
    image_id = ShardReader(packed_copy).images(1, "test")[0]
    for size in (0, 600, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match="another size"):
            ShardReader(packed_copy).targets("z", [image_id])
    path.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        ShardReader(packed_copy).targets("z", [image_id])


def test_a_shard_cut_while_it_is_open_is_an_error(packed_copy: Path) -> None:
    reader = ShardReader(packed_copy)
    ids = reader.images(1, "test")
    reader.targets("z", ids)
    (packed_copy / image_shard_path("z", "shared", 0)).write_bytes(b"x" * 700)
    with pytest.raises(DataError, match="the file ends"):
        reader.targets("z", ids)


def test_a_shard_that_is_replaced_while_it_is_open_is_opened_again(packed_copy: Path) -> None:
    """A repair during a training, or a file handle that a network folder forgot."""
    reader = ShardReader(packed_copy)
    image_id = reader.images(1, "test")[0]
    right = reader.voxels(1, [image_id])
    for row in reader.trials[(reader.trials["subject"] == 1) & (reader.trials["image"] == image_id)]:
        path = packed_copy / reader.index.shards[row["shard"]].path
        sound = path.read_bytes()
        flip_byte(path, int(row["offset"]))  # what is open is wrong
        (packed_copy / "new.tar").write_bytes(sound)
        (packed_copy / "new.tar").rename(path)
    np.testing.assert_array_equal(reader.voxels(1, [image_id]), right)


def test_an_open_file_that_the_system_forgot_is_opened_again(
    packed_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(packed_dir)
    image_id = reader.images(1, "test")[0]
    right, preadv, failures = reader.voxels(1, [image_id]), os.preadv, [errno.ESTALE, errno.EIO]

    def fails_first(*arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), "forgotten")
        return preadv(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", fails_first)
    for _ in range(2):
        failures[:] = failures[:1]
        np.testing.assert_array_equal(reader.voxels(1, [image_id]), right)
        failures.append(errno.EIO)


def test_few_open_files_serve_many_shards(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    reader.files._max_open = 2
    everything = [reader.voxels(subject, reader.images(subject, "train")) for subject in (1, 2, 3)]
    assert len(reader.files._open) <= 2
    again = ShardReader(packed_dir)
    for subject, values in zip((1, 2, 3), everything, strict=True):
        assert (again.voxels(subject, again.images(subject, "train")) == values).all()
    reader.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "another version of the format(.|\n)*update nd_dist"),
        ('"version": 1', '"version": 0', "another version of the format(.|\n)*pack into a new folder"),
        ('"samples": 15', '"samples": 14', "hash differs"),
        ('"format"', '"fromat"', "not the index of packed shards"),
        ("{", "[{", "not valid JSON"),
        ("{", "", "not valid JSON"),
    ],
)
def test_a_changed_index_is_refused(packed_copy: Path, old: str, new: str, message: str) -> None:
    path = packed_copy / "index.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        ShardReader(packed_copy)


def test_an_index_of_other_fields_is_refused_in_words_that_name_them(packed_copy: Path) -> None:
    path = packed_copy / "index.json"
    content = json.loads(path.read_text())
    del content["voxels"]["header"]
    content["subjects"]["1"]["age"] = 30
    content["num_images"] = "many"
    content["id"] = index_id(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        ShardReader(packed_copy)
    message = str(caught.value)
    for words in ("num_images is wrong", "voxels.header is missing", "subjects.1.age is unknown", "pack into a new"):
        assert words in message
    assert "pydantic" not in message


def test_a_folder_without_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nd pack"):
        ShardReader(tmp_path)


def test_a_table_of_another_layout_is_refused(packed_copy: Path) -> None:
    np.save(packed_copy / "index/trials.npy", np.zeros(3))
    with pytest.raises(DataError, match="hash differs"):
        _ = Index.read(packed_copy).trials
    (packed_copy / "index/trials.npy").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        _ = Index.read(packed_copy).trials


def test_a_folder_may_be_given_as_text(packed_dir: Path) -> None:
    assert ShardReader(str(packed_dir)).index.id == ShardReader(packed_dir).index.id
