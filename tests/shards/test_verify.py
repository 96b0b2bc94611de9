from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.codec import image_shard_path, trial_shard_path
from shards.index import Index
from shards.repair import repair
from shards.verify import verify, verify_shard
from tests.shards.support import PooledExtractor, flip_byte, folder_bytes, make_config, pack_alone


def test_a_sound_folder_has_no_problem_and_progress_counts_every_shard(packed_dir: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert verify(packed_dir, lambda done, total: calls.append((done, total))) == []
    num_shards = len(Index.read(packed_dir).shards)
    assert calls == [(done, num_shards) for done in range(1, num_shards + 1)]


@pytest.mark.parametrize("kind", ["trials", "z", "img"])
def test_every_single_flipped_byte_of_a_shard_is_found(packed_copy: Path, kind: str) -> None:
    index = Index.read(packed_copy)
    number = next(number for number, shard in enumerate(index.shards) if shard.kind == kind)
    path = packed_copy / index.shards[number].path
    assert verify_shard(index, number) == []
    # every byte of the first two members, then every 29th and the last
    size = path.stat().st_size
    for offset in [*range(2200 if kind == "z" else 0), *range(0, size, 29), size - 1]:
        flip_byte(path, offset, mask=1 << offset % 8)
        problems = verify_shard(index, number)
        assert problems, f"byte {offset} is wrong and nobody noticed"
        assert problems[0].shard == index.shards[number].path
        flip_byte(path, offset, mask=1 << offset % 8)
    assert verify_shard(index, number) == []


def test_every_truncation_of_a_shard_is_found(packed_copy: Path) -> None:
    index = Index.read(packed_copy)
    path = packed_copy / index.shards[0].path
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert "bytes instead of" in verify_shard(index, 0)[0].what


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
    from shards.receipts import Receipt, receipt_path, write_receipt

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


def test_trials_that_are_not_normalized_are_found(
    phantom_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packer's own mistake: a wrong scale, which no hash can see."""
    from shards import normalize

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
    from shards.verify import check_counts

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
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_images_in_train_and_test_are_found(packed_dir: Path) -> None:
    from shards.verify import check_counts

    index = Index.read(packed_dir)
    trials = index.trials.copy()
    test_image = trials["image"][trials["split"] == 1][0]
    trials["image"][np.flatnonzero(trials["split"] == 0)[0]] = test_image
    index._loaded["trials"] = trials
    assert any("in train and test" in problem.what for problem in check_counts(index))
