from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.codec import image_shard_path, trial_shard_path
from shards.format.index import Index, index_id, json_bytes
from shards.format.tables import ABSENT, table_bytes
from shards.reading.reader import ShardReader, trial_row_key
from shards.reading.records import ShardFiles
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from shards.upkeep.repair import repair
from shards.upkeep.verify import verify, verify_shard
from tests.shards.support import PooledExtractor, flip_byte, folder_bytes, make_config, pack_alone


def test_a_sound_folder_has_no_problem_and_progress_counts_every_shard(packed_dir: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert verify(packed_dir, lambda done, total: calls.append((done, total))) == []
    num_shards = len(Index.read(packed_dir).shards)
    assert calls == [(done, num_shards) for done in range(1, num_shards + 1)]


@pytest.fixture
def tiny_index(phantom_dir: Path, tmp_path: Path) -> Index:
    """The phantom with early visual cortex only and two images a shard: shards of some 20 KB."""
    config = make_config(phantom_dir, tmp_path / "tiny", roi="prf-visualrois", images_per_shard=2, targets=("z",))
    return pack_alone(config)


def folder_of(index: Index) -> Path:
    return Path(index.place)


@pytest.mark.launch
@pytest.mark.parametrize("kind", ["trials", "z", "img"])
def test_every_single_flipped_byte_of_a_shard_is_found_by_verify(tiny_index: Index, kind: str) -> None:
    number = next(number for number, shard in enumerate(tiny_index.shards) if shard.kind == kind)
    path = folder_of(tiny_index) / tiny_index.shards[number].path
    assert verify_shard(tiny_index, number) == []
    for offset in range(path.stat().st_size):
        flip_byte(path, offset, mask=1 << offset % 8)
        problems = verify_shard(tiny_index, number)
        assert problems, f"byte {offset} is wrong and nobody noticed"
        assert problems[0].shard == tiny_index.shards[number].path
        flip_byte(path, offset, mask=1 << offset % 8)
    assert verify_shard(tiny_index, number) == []


@pytest.mark.parametrize("kind", ["trials", "z", "img"])
def test_every_truncation_of_a_shard_is_found_by_verify_and_by_whoever_reads_it(tiny_index: Index, kind: str) -> None:
    number = next(number for number, shard in enumerate(tiny_index.shards) if shard.kind == kind)
    path = folder_of(tiny_index) / tiny_index.shards[number].path
    content = path.read_bytes()
    rows = tiny_index.table(kind)
    row = rows[rows["shard"] == number][:1]
    num_bytes = int(row["bytes"][0]) if kind != "trials" else tiny_index.num_voxels[1] * 2
    record = [np.empty(num_bytes, dtype=np.uint8)]
    files = ShardFiles(tiny_index.store, tiny_index.shards)
    files.read(row, record, str)
    files.close()
    for size in range(len(content) - 1, -1, -1):
        os.truncate(path, size)
        assert "bytes instead of" in verify_shard(tiny_index, number)[0].what
        with pytest.raises(DataError, match="another size"):
            files.read(row, record, str)


def test_every_flipped_byte_of_a_shard_that_is_streamed_is_an_error_or_touches_no_sample(tiny_index: Index) -> None:
    folder = folder_of(tiny_index)
    config = StreamConfig((1,), (), 9, 0, sessions=(2,), threads=1, dtype="stored")
    path = folder / "trials/subj01/nsd-s01-e02.tar"

    def one_pass() -> list[bytes]:
        with TrialStream(ShardReader.over(tiny_index), config) as stream:
            steps = -(-stream.num_items[1] // 9)
            return [batch.voxels[1].numpy().tobytes() for batch in islice(stream, steps)]

    right = one_pass()
    rows = tiny_index.trials[(tiny_index.trials["subject"] == 1) & (tiny_index.trials["session"] == 2)]
    num_bytes = tiny_index.num_voxels[1] * 2
    read = {int(row["offset"]) + k: trial_row_key(row) for row in rows if row["split"] == 0 for k in range(num_bytes)}
    for offset in [*read, *range(0, path.stat().st_size, 29)]:
        flip_byte(path, offset, mask=1 << offset % 8)
        if offset in read:
            with pytest.raises(DataError, match=rf"nsd-s01-e02\.tar, sample {read[offset]}, offset"):
                one_pass()
        else:
            assert one_pass() == right
        flip_byte(path, offset, mask=1 << offset % 8)


def test_a_flipped_record_names_its_sample(packed_copy: Path) -> None:
    index = Index.read(packed_copy)
    row = index.trials[3]
    flip_byte(packed_copy / trial_shard_path(1, 1), int(row["offset"]) + 40)
    [problem] = verify(packed_copy)
    assert problem.shard == trial_shard_path(1, 1)
    assert problem.sample.startswith("s01_e01_t00003_")
    assert problem.sample in str(problem)


def test_a_missing_shard_and_a_missing_table_are_found(packed_copy: Path) -> None:
    (packed_copy / trial_shard_path(2, 1)).unlink()
    [problem] = verify(packed_copy)
    assert "missing" in problem.what
    (packed_copy / "index/z.npy").unlink()
    assert {problem.shard for problem in verify(packed_copy)} == {trial_shard_path(2, 1), "index/z.npy"}


@pytest.mark.parametrize("name", ["index.json", "index/trials.npy", "index/c.npy"])
def test_flipped_bytes_of_index_and_tables_are_found(packed_copy: Path, name: str) -> None:
    path = packed_copy / name
    for offset in range(0, path.stat().st_size, max(1, path.stat().st_size // 40)):
        flip_byte(path, offset, mask=1)
        assert verify(packed_copy), f"byte {offset} of {name}"
        flip_byte(path, offset, mask=1)


def test_a_table_that_points_to_another_sample_is_found_although_all_hashes_agree(
    phantom_dir: Path, tmp_path: Path
) -> None:
    """The packer's own mistake: offsets of two samples exchanged before anything was hashed."""
    from nd_dist.files import read_json
    from shards.packing.receipts import Receipt, receipt_path, write_receipt

    config = make_config(phantom_dir, tmp_path / "shards")
    pack_alone(config)
    path = receipt_path(config.shards_dir, trial_shard_path(1, 2))
    receipt = Receipt(**read_json(path))
    rows = receipt.rows
    rows["offset"][[0, 1]] = rows["offset"][[1, 0]]
    write_receipt(config.shards_dir, Receipt.make(receipt.shard, receipt.recipe, receipt.shape, rows))
    pack_alone(config)
    problems = verify(config.shards_dir)
    assert {problem.shard for problem in problems} == {trial_shard_path(1, 2)}
    assert len({problem.sample for problem in problems}) == 2


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("raw", lambda table: table[:-1], "164 rows instead of 165"),
        ("trials", lambda table: table[:-1], "164 trials instead of 165|165 rows instead of 164"),
        ("z", lambda table: table[:-3], "rows instead of"),
        ("trials", lambda table: with_column(table, "subject", 9), r"trials of subjects \[9\]"),
        ("trials", lambda table: with_column(table, "shard", 10**6), "1 rows name a shard"),
        ("z", lambda table: with_column(table, "shard", 0), "1 rows name a shard that is none of z"),
        ("z", lambda table: table["offset"], "another layout"),
    ],
)
def test_tables_that_contradict_the_index_or_each_other_are_told_although_all_hashes_agree(
    packed_copy: Path, name: str, change: Callable[[np.ndarray], np.ndarray], told: str
) -> None:
    index = Index.read(packed_copy)
    content = index.model_dump(mode="json", exclude={"id"})
    table = table_bytes(changed := change(index.table(name).copy()))
    (packed_copy / content["tables"][name]["path"]).write_bytes(table)
    sha256 = hashlib.sha256(table).hexdigest()
    content["tables"][name] |= {"rows": len(changed), "bytes": len(table), "sha256": sha256}
    (packed_copy / "index.json").write_bytes(json_bytes({**content, "id": index_id(content)}))
    assert any(re.search(told, problem.what) for problem in verify(packed_copy))


def with_column(table: np.ndarray, name: str, value: int) -> np.ndarray:
    table[name][np.flatnonzero(table["shard"] != ABSENT)[0]] = value
    return table


def test_trials_that_are_not_normalized_are_found(
    phantom_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packer's own mistake: a wrong scale, which no hash can see."""
    from shards.packing import normalize

    right = normalize.zscore
    monkeypatch.setattr(normalize, "zscore", lambda *args: (right(*args)[0] * np.float32(1.02), right(*args)[1]))
    pack_alone(make_config(phantom_dir, tmp_path / "shards", targets=(), pictures="none", subjects=(1,)))
    problems = verify(tmp_path / "shards")
    assert len(problems) == 4
    assert all("standard deviation" in problem.what for problem in problems)


@pytest.mark.parametrize(
    "damage", ["shard", "short shard", "missing shard", "index", "table", "receipt", "two shards", "nothing"]
)
def test_repair_and_packing_again_give_the_same_bytes_and_repeat_only_what_was_broken(
    phantom_dir: Path, packed_dir: Path, packed_copy: Path, damage: str
) -> None:
    trial, image = packed_copy / trial_shard_path(3, 2), packed_copy / image_shard_path("z", "s01", 0)
    if damage in ("shard", "two shards"):
        flip_byte(trial, 3000)
    if damage == "two shards":
        flip_byte(image, 700)
    if damage == "short shard":
        trial.write_bytes(trial.read_bytes()[:5000])
    if damage == "missing shard":
        trial.unlink()
    if damage == "index":
        flip_byte(packed_copy / "index.json", 500)
    if damage == "table":
        flip_byte(packed_copy / "index/trials.npy", 500)
    if damage == "receipt":
        (packed_copy / ".pack/nsd-s03-e02.tar.json").write_text("oops")
    times = {path: path.stat().st_mtime_ns for path in packed_copy.rglob("*.tar")}
    removed = repair(packed_copy)
    assert bool(removed) == (damage != "nothing")
    extractor = PooledExtractor()
    pack_alone(make_config(phantom_dir, packed_copy), extractor)
    assert folder_bytes(packed_copy) == folder_bytes(packed_dir)
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed <= {trial, image}
    assert bool(extractor.batches) == (damage == "two shards")


def test_known_counts_are_checked_only_where_the_data_set_is_nsd_itself(packed_dir: Path, tmp_path: Path) -> None:
    from shards.upkeep.verify import check_counts

    index = Index.read(packed_dir)
    assert list(check_counts(index)) == []
    as_nsd = index.model_copy(
        update={
            "num_images": 73_000,
            "subjects": {1: index.subjects[1].model_copy(update={"sessions": 40})},
        }
    )
    problems = [str(problem) for problem in check_counts(as_nsd)]
    assert any("instead of 40 (the index)" in problem for problem in problems)
    assert any("trials instead of 3000 (NSD's known counts)" in problem for problem in problems)
    assert any("voxels instead of 15724 (NSD's known counts)" in problem for problem in problems)
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_known_counts_of_whole_early_and_partial_releases() -> None:
    from shards.sources.known import NSD, KnownCounts, nsd_counts

    assert nsd_counts(3, NSD[3]) == NSD[3]
    early = nsd_counts(5, KnownCounts(37, 0, 9_990, 0, 0, 0))
    assert early == KnownCounts(37, 27_750, 9_990, 982, 2770, 13_039)
    part = nsd_counts(8, KnownCounts(3, 99, 1, 2, 3, 4))
    assert part == KnownCounts(3, 2250, 1, 2, 3, 14_386)
    assert nsd_counts(9, NSD[3]) is None


def test_images_in_train_and_test_are_found(packed_dir: Path) -> None:
    from shards.upkeep.verify import check_counts

    index = Index.read(packed_dir)
    trials = index.trials.copy()
    test_image = trials["image"][trials["split"] == 1][0]
    trials["image"][np.flatnonzero(trials["split"] == 0)[0]] = test_image
    index._loaded["trials"] = trials
    assert any("in train and test" in problem.what for problem in check_counts(index))
