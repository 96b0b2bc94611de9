import errno
import os
from pathlib import Path

import pytest

from nd_dist.errors import DataError
from nd_dist.files import atomic_path, hash_json, read_json, sha256_file, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No space left") as caught, atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 4
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_writing_to_a_full_device_is_reported_by_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be written"), atomic_path(tmp_path / "a.bin"):
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")


def test_json_is_read_back_and_equal_values_have_equal_hashes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "ä"})
    assert read_json(tmp_path / "a.json") == {"a": "ä", "b": [1, 2.5]}
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})


def test_missing_and_broken_json_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        read_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json"):
        read_json(tmp_path / "broken.json")


def test_nan_never_reaches_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")
