from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nd_dist.checkpoint import (
    FileRecord,
    read_manifest,
    read_pointer,
    read_tensors,
    write_manifest,
    write_pointer,
    write_tensors,
)
from nd_dist.errors import CheckpointError


def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"aaaa")
    (tmp_path / "sub" / "b.bin").write_bytes(b"bb")
    write_manifest(tmp_path, {n: FileRecord.of(tmp_path / n) for n in ("a.bin", "sub/b.bin")}, {"step": 3})
    return tmp_path


def test_tensors_come_back_as_they_were_also_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "column": base[:, 1], "half": base.bfloat16()}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_missing_and_damaged_tensor_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_tensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "t.safetensors")


def test_a_complete_folder_gives_its_facts(tmp_path: Path) -> None:
    assert read_manifest(folder(tmp_path)) == {"step": 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "no manifest"),
        (lambda d: (d / "a.bin").unlink(), "missing"),
        (lambda d: (d / "a.bin").write_bytes(b"aaa"), "torn"),
        (lambda d: (d / "sub" / "b.bin").write_bytes(b"bc"), "damaged"),
        (lambda d: (d / "manifest.json").write_text(json.dumps({"format": 99})), "another format"),
    ],
)
def test_any_damage_to_a_folder_is_found(tmp_path: Path, damage: object, message: str) -> None:
    damage(folder(tmp_path))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_the_pointer_names_the_newest_folder_or_nothing(tmp_path: Path) -> None:
    assert read_pointer(tmp_path) == ""
    write_pointer(tmp_path, "step-1")
    write_pointer(tmp_path, "step-2")
    assert read_pointer(tmp_path) == "step-2"
