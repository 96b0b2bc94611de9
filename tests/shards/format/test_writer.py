from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards.format.codec import image_key, npy_header
from shards.format.writer import open_shard
from shards.packing.plan import tar_bytes


def write(path: Path, count: int = 3) -> tuple[list[int], str, int]:
    header = npy_header("<f2", (5,))
    with open_shard(path) as writer:
        for image_id in range(count):
            writer.add_array(image_key(image_id), "c.npy", header, np.full(5, image_id, "<f2").tobytes())
    info = writer.info(path.name, "c", "shared")
    return [record.offset for record in writer.records], info.sha256, info.bytes


def test_offsets_hash_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    offsets, sha256, num_bytes = write(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256
    assert len(content) == num_bytes == tar_bytes(3, 138)
    for image_id, offset in enumerate(offsets):
        assert (np.frombuffer(content, "<f2", 5, offset) == image_id).all()


def test_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar.getmembers():
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o444


def test_tar_and_stock_webdataset_read_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    listing = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True).stdout
    assert listing.split() == ["i00000.c.npy", "i00001.c.npy", "i00002.c.npy"]
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["i00000", "i00001", "i00002"]
    assert (samples[2]["c.npy"] == 2).all()


def test_a_failure_leaves_no_shard_and_no_part(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_shard(tmp_path / "a.tar") as writer:
        writer.add_bytes("i00000", "png", b"123")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
