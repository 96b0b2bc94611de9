"""Every picture, weight and data file that is tracked has its source and licence in ``LICENSES.md``."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = {".csv", ".gif", ".gz", ".h5", ".jpeg", ".jpg", ".json", ".mat", ".npy", ".npz", ".pdf", ".png", ".safetensors",
        ".svg", ".tsv", ".txt", ".webp"}  # fmt: skip
OWN_TEXT = ("constraints/*",)


def rows() -> list[list[str]]:
    """Return the cells of the table's rows."""
    lines = (ROOT / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def is_data(name: str) -> bool:
    path = ROOT / name
    return path.suffix in DATA or b"\0" in path.read_bytes()[:65536]


def uncovered(names: list[str]) -> list[str]:
    patterns = [pattern for row in rows() for pattern in re.findall(r"`([^`]+)`", row[0])]
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in (*patterns, *OWN_TEXT))]


def test_every_tracked_data_file_has_a_row() -> None:
    data = [name for name in tracked() if is_data(name)]
    assert len(data) > 20
    assert uncovered(data) == [], "add these to LICENSES.md: what, source, licence"


@pytest.mark.parametrize("name", ["shards/phantom/data/new.npz", "docs/photo.jpg", "tests/data/other/bold.nii.gz"])
def test_a_new_file_of_unknown_source_would_be_found(name: str) -> None:
    assert uncovered([name]) == [name]


def test_every_row_says_what_from_where_and_under_which_licence() -> None:
    assert len(rows()) > 5
    for row in rows():
        assert len(row) == 4
        assert all(row), row


def test_the_licences_that_ask_for_it_are_reproduced_with_their_copyright_lines() -> None:
    text = (ROOT / "LICENSES.md").read_text(encoding="utf-8")
    for words in (
        "Copyright (c) Microsoft Corporation",
        "Permission is hereby granted",
        "CC BY-SA 3.0",
        "Unicode License v3",
    ):
        assert words in text
