"""Results on disk: whole, once, and never another setting's."""

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from nd_dist.fanout.results import (
    claim_folder,
    has_result,
    publish,
    read_png,
    read_record,
    remove_leftovers,
    write_png,
)


def put(folder: Path, text: str, fingerprint: str = "f") -> bool:
    return publish(folder, fingerprint, {"text": text}, lambda staging: (staging / "x").write_text(text) and None)


def test_a_result_appears_whole_and_is_recognised_by_its_fingerprint(tmp_path: Path) -> None:
    assert put(tmp_path / "a", "one")
    assert (tmp_path / "a" / "x").read_text() == "one"
    assert read_record(tmp_path / "a")["text"] == "one"
    assert has_result(tmp_path / "a", "f")
    assert not has_result(tmp_path / "a", "g")
    assert os.listdir(tmp_path) == ["a"]


def test_the_first_result_counts(tmp_path: Path) -> None:
    put(tmp_path / "a", "one")
    assert not put(tmp_path / "a", "two")
    assert (tmp_path / "a" / "x").read_text() == "one"


def test_a_result_of_another_fingerprint_is_replaced(tmp_path: Path) -> None:
    put(tmp_path / "a", "old", "g")
    assert put(tmp_path / "a", "new")
    assert (tmp_path / "a" / "x").read_text() == "new"


def _race(folder: Path, name: str) -> bool:
    return put(folder, name)


def test_of_many_processes_that_publish_at_once_one_wins_whole(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(6) as pool:
        won = pool.starmap(_race, [(tmp_path / "a", f"rank {rank}") for rank in range(24)])
    assert sum(won) == 1
    text = (tmp_path / "a" / "x").read_text()
    assert read_record(tmp_path / "a")["text"] == text
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_nothing_behind_and_is_said_clearly(tmp_path: Path) -> None:
    def full(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        publish(tmp_path / "a", "f", {}, full)
    assert os.listdir(tmp_path) == []


def test_folders_of_killed_ranks_can_be_swept_up(tmp_path: Path) -> None:
    (tmp_path / "p" / ".image.host-1-2.part").mkdir(parents=True)
    put(tmp_path / "p" / "image", "kept")
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(tmp_path / "p") == ["image"]


def test_results_of_other_settings_move_aside_and_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "point" / "subj01"
    assert claim_folder(folder, "aaaa1111", {"seed": 1}) == "new"
    put(folder / "image", "first", "aaaa1111")
    assert claim_folder(folder, "aaaa1111", {"seed": 1}) == "kept"
    assert claim_folder(folder, "bbbb2222", {"seed": 2}) == "moved"
    assert not (folder / "image").exists()
    put(folder / "image", "second", "bbbb2222")
    assert claim_folder(folder, "aaaa1111", {"seed": 1}) == "restored"
    assert (folder / "image" / "x").read_text() == "first"
    assert claim_folder(folder, "bbbb2222", {"seed": 2}) == "restored"
    assert (folder / "image" / "x").read_text() == "second"


def test_a_png_comes_back_as_it_was(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", picture)
    assert (read_png(tmp_path / "a.png") == picture).all()


@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_a_damaged_png_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.png"
    write_png(path, np.zeros((30, 30, 3), dtype=np.uint8))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:40] if damage == "torn" else b"text")
    with pytest.raises(DataError, match="remove the folder"):
        read_png(path)
