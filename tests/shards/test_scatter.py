from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from shards import scatter
from shards.scatter import MAX_READS, Places, ScatteredReads

SIZE = 5_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("scatter")
    paths = [folder / str(number) for number in range(3)]
    for path in paths:
        path.write_bytes(rng.bytes(SIZE))
    return paths


def read(reads: ScatteredReads, files: list[Path], which: list[int], offsets: list[int], step: int) -> tuple:
    """Read 100 bytes from each place; return the bytes (N, 100) and which reads were said to be whole."""
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    memory = np.zeros((len(which), 100), dtype=np.uint8)
    places = Places(
        np.array([descriptors[number] for number in which]),
        np.array(offsets, dtype=np.uint64),
        memory.ctypes.data + 100 * np.arange(len(which)),
        100,
    )
    is_whole = np.zeros(len(which), dtype=np.bool_)
    for start, stop, part in reads.read(places, step):
        is_whole[start:stop] = part
    for descriptor in descriptors:
        os.close(descriptor)
    return memory, is_whole


def expected(files: list[Path], which: list[int], offsets: list[int]) -> list[bytes]:
    contents = [path.read_bytes() for path in files]
    return [contents[number][offset : offset + 100] for number, offset in zip(which, offsets, strict=True)]


def has_calls() -> bool:
    return ScatteredReads()._context is not None


needs_calls = pytest.mark.skipif(not has_calls(), reason="this system reads record by record")


@needs_calls
@pytest.mark.parametrize("step", [1, 7, MAX_READS])
def test_places_of_several_files_in_any_order_are_read_to_where_they_belong(files: list[Path], step: int) -> None:
    rng = np.random.default_rng(1)
    which, offsets = rng.integers(0, 3, 300).tolist(), rng.integers(0, SIZE - 100, 300).tolist()
    memory, is_whole = read(ScatteredReads(), files, which, offsets, step)
    assert is_whole.all()
    assert [row.tobytes() for row in memory] == expected(files, which, offsets)


@needs_calls
def test_a_read_over_the_end_of_a_file_is_not_whole_and_the_others_are(files: list[Path]) -> None:
    which, offsets = [0, 1, 2, 0], [0, SIZE - 99, 17, SIZE + 1]
    memory, is_whole = read(ScatteredReads(), files, which, offsets, MAX_READS)
    assert is_whole.tolist() == [True, False, True, False]
    assert memory[2].tobytes() == files[2].read_bytes()[17:117]


@needs_calls
def test_a_descriptor_that_cannot_be_read_leaves_its_own_read_and_later_ones_undone(files: list[Path]) -> None:
    memory = np.zeros((3, 100), dtype=np.uint8)
    with open(files[0], "rb") as good, open(os.devnull, "wb") as bad:
        descriptors = np.array([good.fileno(), bad.fileno(), good.fileno()])
        addresses = memory.ctypes.data + 100 * np.arange(3)
        places = Places(descriptors, np.zeros(3, dtype=np.uint64), addresses, 100)
        ((_, _, is_whole),) = ScatteredReads().read(places, MAX_READS)
    assert is_whole.tolist() == [True, False, False]


@needs_calls
def test_threads_read_at_once_and_leave_no_context_behind(files: list[Path]) -> None:
    reads = ScatteredReads()
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        which, offsets = rng.integers(0, 3, 40).tolist(), rng.integers(0, SIZE - 100, 40).tolist()
        memory, is_whole = read(reads, files, which, offsets, 16)
        if not is_whole.all() or [row.tobytes() for row in memory] != expected(files, which, offsets):
            wrong.append(seed)

    counter = Path("/proc/sys/fs/aio-nr")
    for round_number in range(150):  # more contexts than the system allows at once, were they kept
        threads = [threading.Thread(target=work, args=(4 * round_number + number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert not counter.exists() or int(counter.read_text()) < 150 * 4 * MAX_READS


def test_where_the_system_has_no_such_calls_nothing_is_read(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter.platform, "machine", lambda: "another")
    memory, is_whole = read(ScatteredReads(), files, [0, 1], [0, 1], MAX_READS)
    assert not is_whole.any()
    assert not memory.any()
