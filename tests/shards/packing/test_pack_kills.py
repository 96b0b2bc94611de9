"""Packing killed with -9 at many moments, alone and with MPI ranks; then finished, with the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nd_dist.errors import DataError
from shards.format.index import Index
from shards.packing.receipts import remove_abandoned_parts
from shards.upkeep.verify import verify
from tests.shards.support import MPIRUN, folder_bytes, make_config, pack_alone, start_ranks
from tests.support.waiting import HANG_S, wait_until


def wait_for(process: subprocess.Popen[bytes], folder: Path, pattern: str, count: int) -> None:
    """Wait until so many files are there; some kinds come and go so fast that a packer can end before one is seen."""
    wait_until(lambda: len(list(folder.glob(pattern))) >= count or process.poll() is not None, pause_s=0.001)


def wait_until_nobody_packs(folder: Path) -> None:
    """Wait until the ranks of a killed mpirun are dead: its helpers end them a moment later."""

    def nobody_packs() -> bool:
        return not any(str(folder) in (rank.info["cmdline"] or ()) for rank in psutil.process_iter(["cmdline"]))

    wait_until(nobody_packs)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("pattern", "count"),
    [("**/*.part", 1), ("trials/*/*.tar", 3), (".pack/*.json", 11), ("features/z/*.tar", 2), ("index/*.npy", 1)],
)
def test_a_killed_packer_leaves_only_whole_shards_and_goes_on_to_the_same_bytes(
    phantom_dir: Path, packed_dir: Path, tmp_path: Path, pattern: str, count: int
) -> None:
    folder = tmp_path / "shards"
    process = start_ranks(1, phantom_dir, folder, pause_s=0.01)
    wait_for(process, folder, pattern, count)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    expected = folder_bytes(packed_dir)
    for path, content in folder_bytes(folder).items():
        if not path.endswith(".part"):
            assert content == expected[path], "what has its name is whole"
    pack_alone(make_config(phantom_dir, folder))
    assert folder_bytes(folder) == expected


@pytest.mark.launch
@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the extra mpi")
@pytest.mark.parametrize(("ranks", "next_ranks"), [(2, 3), (3, 1)])
def test_killed_ranks_are_followed_by_any_number_of_others(
    phantom_dir: Path, packed_dir: Path, tmp_path: Path, ranks: int, next_ranks: int
) -> None:
    folder = tmp_path / "shards"
    process = start_ranks(ranks, phantom_dir, folder, pause_s=0.02)
    wait_for(process, folder, ".pack/*.json", 9)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not Index.exists(folder)
    wait_until_nobody_packs(folder)
    if next_ranks == 1:
        pack_alone(make_config(phantom_dir, folder))
    else:
        output, _ = start_ranks(next_ranks, phantom_dir, folder).communicate(timeout=HANG_S)
        assert Index.exists(folder), output.decode()
    assert verify(folder) == []
    remove_abandoned_parts(folder)
    assert folder_bytes(folder) == folder_bytes(packed_dir)


def test_a_full_disk_stops_packing_without_half_files_and_more_room_finishes_it(
    phantom_dir: Path, packed_dir: Path, small_disk: Path
) -> None:
    config = make_config(phantom_dir, small_disk / "shards").model_copy(update={"run_dir": small_disk.parent / "run"})
    with pytest.raises(DataError, match="No space left"):
        pack_alone(config)
    expected = folder_bytes(packed_dir)
    left = folder_bytes(small_disk / "shards")
    assert left, "some shards fitted"
    assert all(expected[path] == content for path, content in left.items())
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    pack_alone(config)
    assert folder_bytes(small_disk / "shards") == expected


def test_half_files_of_a_dead_packer_that_nobody_has_reaped_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a zombie
    parts = [tmp_path / f"a.tar.{socket.gethostname()}-{pid}-1.part" for pid in (dead.pid, os.getpid())]
    for part in parts:
        part.touch()
    remove_abandoned_parts(tmp_path)
    assert [part.exists() for part in parts] == [False, True]
    dead.wait()
