from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.phantom.write import write_phantom
from tests.shards.support import PHANTOM, SEED, make_config, pack_alone


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom NSD; read only."""
    folder = tmp_path_factory.mktemp("nsd") / "phantom"
    write_phantom(folder, PHANTOM, SEED)
    return folder


@pytest.fixture(scope="session")
def packed_dir(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small phantom, packed by one process; read only."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack_alone(make_config(phantom_dir, folder))
    return folder


@pytest.fixture
def packed_copy(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy of the packed phantom that a test may damage."""
    return Path(shutil.copytree(packed_dir, tmp_path / "shards"))


@pytest.fixture
def phantom_copy(phantom_dir: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may damage."""
    return Path(shutil.copytree(phantom_dir, tmp_path / "nsd"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {result.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture
def another_user(tmp_path: Path) -> int:
    """The id of a user who may look into this test's folder, but owns nothing in it."""
    if os.getuid():
        pytest.skip("needs the right to become another user")
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path(tempfile.gettempdir()) and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    return 12345
