from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks._shards import evict
from nd_dist.errors import DataError
from nd_dist.schema import Batch
from shards import helpers, records
from shards import stream as stream_module
from shards.buffers import BufferPool
from shards.checksum import checksum
from shards.codec import trial_shard_path
from shards.helper_process import Shards
from shards.helpers import Helper, Task, can_help
from shards.reader import ShardReader
from shards.records import ShardFiles
from shards.stream import StreamConfig, TrialStream
from tests.shards.support import flip_byte

pytestmark = pytest.mark.skipif(not can_help(), reason="here no process can read its parent's open files")
CONFIG = StreamConfig(subjects=(1, 2, 3), targets=("z", "c"), samples_per_subject=12, seed=5)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader processes from the first step on: the stream waits until they have started."""
    monkeypatch.setattr(stream_module, "HELP_AFTER_BYTES", 0)
    monkeypatch.setattr(helpers._Process, "has_answered", lambda process: bool(process._poll.poll(20_000)))


def values(batch: Batch) -> tuple[bytes, ...]:
    return tuple(part.numpy().tobytes() for part in (*batch.voxels.values(), *batch.targets.values()))


def read(folder: Path, count: int) -> list[tuple[bytes, ...]]:
    with TrialStream(ShardReader(folder), CONFIG) as stream:
        return [values(batch) for batch in islice(stream, count)]


def processes(stream: TrialStream) -> list[int]:
    """Read on until a reader process is ready and waits for work; return the ids of all that are and do."""
    for _ in stream:
        waiting = [helper for helper in list(stream._helpers) if helper._is_ready]
        if found := [helper._process.pid for helper in waiting if helper._process is not None]:
            return found
    raise AssertionError("a stream does not end")


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_read_what_threads_read(packed_dir: Path, request: pytest.FixtureRequest) -> None:
    by_threads = read(packed_dir, 40)
    request.getfixturevalue("at_once")
    assert read(packed_dir, 40) == by_threads


def test_records_are_read_by_the_processes(packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardFiles, "_read_here", lambda *_: pytest.fail("a record was left to the parent"))
    assert len(read(packed_dir, 10)) == 10


def test_a_step_may_lie_in_more_shards_than_may_be_in_use_at_once(
    packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(packed_dir, 10)
    in_use = set()
    message = Task.message

    def count(task: Task) -> bytes:
        in_use.add(len(task.shards))
        return message(task)

    monkeypatch.setattr(records, "max_shards_at_once", lambda: 2)
    monkeypatch.setattr(Task, "message", count)
    monkeypatch.setattr(ShardFiles, "_read_here", lambda *_: pytest.fail("a record was left to the parent"))
    assert read(packed_dir, 10) == expected
    assert in_use == {1, 2}


def test_a_process_that_dies_costs_nothing_but_time(packed_dir: Path, at_once: None) -> None:
    expected = read(packed_dir, 30)
    with TrialStream(ShardReader(packed_dir), CONFIG) as stream:
        found = [values(batch) for batch in islice(stream, 10)]
        for process in processes(stream):
            os.kill(process, signal.SIGKILL)
        stream.load_state_dict(stream.state_dict() | {"step": 10})
        found += [values(batch) for batch in islice(stream, 20)]
    assert found == expected


def test_batches_that_are_kept_let_the_memory_grow_and_keep_their_values(packed_dir: Path, at_once: None) -> None:
    expected = read(packed_dir, 12)
    with TrialStream(ShardReader(packed_dir), CONFIG) as stream:
        kept = list(islice(stream, 12))
    assert [values(batch) for batch in kept] == expected


def test_a_damaged_record_is_the_same_error(packed_copy: Path, at_once: None) -> None:
    reader = ShardReader(packed_copy)
    row = reader.trials[(reader.trials["subject"] == 1) & (reader.trials["split"] == 0)][0]
    path = packed_copy / trial_shard_path(1, int(row["session"]))
    flip_byte(path, int(row["offset"]))
    with TrialStream(reader, CONFIG) as stream:
        with pytest.raises(DataError, match="checksum") as caught:
            for _ in stream:
                pass
        assert f"offset {int(row['offset'])}" in str(caught.value)
        flip_byte(path, int(row["offset"]))
        next(stream)


def test_closing_the_stream_ends_the_processes(packed_dir: Path, at_once: None) -> None:
    with TrialStream(ShardReader(packed_dir), CONFIG) as stream:
        found = processes(stream)
    assert not any(is_running(process) for process in found)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent_and_outlive_a_ctrl_c(packed_dir: Path, kind: signal.Signals) -> None:
    program = f"""
import sys, time
from shards import stream
from shards.reader import ShardReader
from tests.shards.test_helpers import CONFIG, processes
stream.HELP_AFTER_BYTES = 0
with stream.TrialStream(ShardReader({str(packed_dir)!r}), CONFIG) as trials:
    print(*processes(trials), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        found = [int(word) for word in parent.stdout.readline().split()]
        assert found
        for process in found:
            os.kill(process, signal.SIGINT)
        time.sleep(0.2)
        assert all(is_running(process) for process in found)
        parent.send_signal(kind)
    deadline = time.monotonic() + 10
    while any(is_running(process) for process in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(process) for process in found)


def test_where_no_process_can_start_the_threads_read(
    packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(packed_dir, 5)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert read(packed_dir, 5) == expected


def test_a_shard_that_is_cut_while_it_is_mapped_is_the_same_error(packed_copy: Path, at_once: None) -> None:
    path = packed_copy / trial_shard_path(1, 1)
    content = path.read_bytes()
    with TrialStream(ShardReader(packed_copy), CONFIG) as stream:
        expected = [values(batch) for batch in islice(stream, 30)]  # later passes read the mapping
        os.truncate(path, 0)  # a page that is gone ends the process
        with pytest.raises(DataError, match=path.name):
            for _ in stream:
                pass
        path.write_bytes(content)
        stream.load_state_dict(stream.state_dict() | {"step": 0})
        assert [values(batch) for batch in islice(stream, 30)] == expected


def make_files(folder: Path, *sizes: int) -> list[tuple[int, int]]:
    """Write files 0, 1, ... as ``Shards`` finds them; return (identity, name) of each."""
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(os.urandom(size))
    return [((folder / str(number)).stat().st_ino, number) for number in range(len(sizes))]


def test_what_was_read_before_is_mapped_while_there_is_room(tmp_path: Path) -> None:
    files = make_files(tmp_path, 100, 300, 50)
    contents = [(tmp_path / str(number)).read_bytes() for number in range(3)]
    shards = Shards(str(tmp_path), room=200, max_open=10)
    opened = shards.find(files, may_map=False)
    assert [os.pread(found, 300, 0) for found in opened if isinstance(found, int)] == contents
    first, second, third = shards.find(files, may_map=True)
    assert isinstance(second, int)  # it is larger than the room
    assert [bytes(first), os.pread(second, 300, 0), bytes(third)] == contents  # type: ignore[arg-type]
    assert shards.find(files[:1], may_map=False) == [first]
    shards.unmap()
    assert all(isinstance(found, int) for found in shards.find(files, may_map=True))


def test_no_more_files_stay_open_than_the_limit(tmp_path: Path) -> None:
    files = make_files(tmp_path, *[8] * 6)
    shards = Shards(str(tmp_path), room=0, max_open=3)
    for file in files * 3:
        (found,) = shards.find([file], may_map=True)
        assert isinstance(found, int)
        assert os.pread(found, 8, 0) == (tmp_path / str(file[1])).read_bytes()
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        opened = [link for link in links if link.is_symlink() and os.readlink(link).startswith(str(tmp_path))]
        assert len(opened) <= 4


@pytest.mark.parametrize("is_cold", [False, True])
def test_where_pages_do_not_stay_in_memory_mapping_is_given_up(tmp_path: Path, is_cold: bool) -> None:
    count, length = 64, 32 * 1024
    ((inode, _),) = make_files(tmp_path, count * length)
    path = tmp_path / "0"
    content = path.read_bytes()
    pool = BufferPool()
    records = pool.lend((count, length), np.uint8)
    starts = np.arange(count) * length
    with closing(Helper()) as helper, open(path, "rb") as file:
        task = Task(
            memory=(pool.descriptor, pool.num_bytes),
            were_read_before=True,
            shards=(((0, inode), file.fileno()),),
            which=np.zeros(count, dtype=np.int64),
            offsets=starts.astype(np.uint64),
            places=starts,
            lengths=np.full(count, length),
            checksums=np.array([checksum(memoryview(content)[start : start + length]) for start in starts], np.uint64),
        )
        if is_cold and evict([path]) > 0:
            pytest.skip("the files here cannot be thrown out of memory")
        while not helper.is_ready():
            time.sleep(0.01)
        assert helper.read(task).all()
        assert records.tobytes() == content
        assert helper.read(task).all()  # whoever answers again has done with what came after the first answer
        assert helper._process is not None
        assert (str(path) in Path(f"/proc/{helper._process.pid}/maps").read_text()) != is_cold
