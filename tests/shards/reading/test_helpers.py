from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.support.shards import evict
from nd_dist.errors import DataError
from nd_dist.schema import Batch
from shards.format.checksum import checksum
from shards.format.codec import trial_shard_path
from shards.reading import helpers
from shards.reading import stream as stream_module
from shards.reading.buffers import BufferPool
from shards.reading.helper_process import Shard, Shards
from shards.reading.helpers import Helper, Task, can_help
from shards.reading.reader import ShardReader
from shards.reading.records import ShardFiles
from shards.reading.stream import StreamConfig, TrialStream
from tests.shards.support import flip_byte
from tests.support.rank_processes import assert_gone, is_running

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
    """Read on until a reader process is ready and none has work; return the ids of all."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        list(islice(stream, 10))
        time.sleep(0.05)  # until what is read ahead has been read
        if any(helper._is_ready for helper in list(stream._helpers._idle)):
            children = psutil.Process().children()
            return [child.pid for child in children if "helper_process" in " ".join(child.cmdline())]
    raise AssertionError("the processes did not start")


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

    monkeypatch.setattr(stream_module, "max_shards_at_once", lambda threads: 2)
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
from shards.reading import stream
from shards.reading.reader import ShardReader
from tests.shards.reading.test_helpers import CONFIG, processes
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
    assert_gone(found)


def test_where_no_process_can_start_the_threads_read(
    packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(packed_dir, 5)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert read(packed_dir, 5) == expected


def maps(process: int) -> str:
    return Path(f"/proc/{process}/maps").read_text()


def test_a_shard_that_is_cut_while_it_is_mapped_is_the_same_error(
    packed_copy: Path, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = packed_copy / trial_shard_path(1, 1)
    content = path.read_bytes()
    with TrialStream(ShardReader(packed_copy), CONFIG) as stream:
        expected = [values(batch) for batch in islice(stream, 40)]  # later passes read the mappings
        assert all(str(path) in maps(process) for process in processes(stream))
        os.truncate(path, 0)  # a page that is gone ends the process
        stream.load_state_dict(stream.state_dict() | {"step": 0})
        with pytest.raises(DataError, match=path.name):
            for _ in stream:
                pass
        path.write_bytes(content)
        stream.load_state_dict(stream.state_dict() | {"step": 0})
        assert [values(batch) for batch in islice(stream, 40)] == expected
    assert f"exit code {-signal.SIGBUS}" in caplog.text


def test_after_some_processes_were_lost_the_threads_read(
    packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read(packed_dir, 5)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    caplog.clear()
    assert read(packed_dir, 5) == expected
    assert 3 <= caplog.text.count("exit code 1") < 3 + CONFIG.threads
    assert caplog.text.count("from now on the threads read") == 1


def test_an_interrupted_exchange_ends_the_process(
    packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer must not be taken for that of the next task, and the stream goes on with the step that failed."""
    expected = read(packed_dir, 40)
    interrupted = []

    def receive(process: helpers._Process) -> bytes:
        interrupted.append(process.pid)
        raise MemoryError

    with TrialStream(ShardReader(packed_dir), CONFIG) as stream:
        processes(stream)
        with monkeypatch.context() as broken:
            broken.setattr(helpers._Process, "receive", receive)
            with pytest.raises(MemoryError):
                for _ in stream:
                    pass
        assert values(next(stream)) == expected[stream.step - 1]
        found = [values(batch) for batch in islice(stream, 5)]
        assert found == expected[stream.step - 5 : stream.step]
    assert interrupted
    assert not any(is_running(process) for process in interrupted)


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Callable[..., Shards]]:
    """Makes ``Shards`` over files 0, 1, ... of random content."""
    made: list[Shards] = []

    def make(sizes: Sequence[int], **limits: int) -> Shards:
        for number, size in enumerate(sizes):
            (tmp_path / str(number)).write_bytes(os.urandom(size))
        made.append(Shards(str(tmp_path), **limits))
        return made[-1]

    yield make
    for one in made:
        one._max_open = 0
        one._close_some(0, ())


def find(shards: Shards, folder: Path, *numbers: int) -> list[Shard]:
    identities = [((status := (folder / str(n)).stat()).st_dev, status.st_ino) for n in numbers]
    found = [shard for shard in shards.find(list(zip(identities, numbers, strict=True))) if shard is not None]
    assert len(found) == len(numbers)
    return found


def content(shard: Shard, was_read: bool) -> bytes:
    record = bytearray(shard.num_bytes)
    shard.read(0, memoryview(record), was_read)
    return bytes(record)


def test_what_was_read_before_is_mapped_while_there_is_room(tmp_path: Path, shards: Callable[..., Shards]) -> None:
    opened = shards([100, 300, 50], max_open=10, mappable_bytes=200)
    found = find(opened, tmp_path, 0, 1, 2)
    expected = [(tmp_path / str(number)).read_bytes() for number in range(3)]
    for was_read, mapped in ((False, [False] * 3), (True, [True, False, True])):
        assert [content(shard, was_read) for shard in found] == expected
        assert [shard.mapping is not None for shard in found] == mapped
    opened.unmap()
    assert [shard.mapping for shard in found] == [None] * 3
    assert content(found[0], was_read=True) == expected[0]


def test_no_more_shards_stay_open_than_the_limit(tmp_path: Path, shards: Callable[..., Shards]) -> None:
    opened = shards([8] * 6, max_open=3, mappable_bytes=24)
    for number in [*range(6)] * 3:
        (shard,) = find(opened, tmp_path, number)
        assert content(shard, was_read=True) == (tmp_path / str(number)).read_bytes()
        assert shard.mapping is not None  # those that were closed made room
        assert open_files(tmp_path) <= 6  # a mapping holds a file too
    find(opened, tmp_path, 0, 1, 2)
    find(opened, tmp_path, 0, 3)
    assert len(opened._open) == 3
    assert len(find(opened, tmp_path, *range(6))) == 6
    find(opened, tmp_path, 0, 1)
    assert len(find(opened, tmp_path, 0, 1, 2)) == 3


def open_files(folder: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if link.is_symlink())


def test_a_deleted_shard_is_given_up_once_another_is_opened(tmp_path: Path, shards: Callable[..., Shards]) -> None:
    """A cache that evicts files gets their space back."""
    opened = shards([8, 8], max_open=10, mappable_bytes=8)
    (shard,) = find(opened, tmp_path, 0)
    content(shard, was_read=True)
    (tmp_path / "0").unlink()
    (other,) = find(opened, tmp_path, 1)
    assert open_files(tmp_path) == 1
    content(other, was_read=True)
    assert other.mapping is not None  # in its room


def test_another_file_in_the_place_of_a_shard_is_not_taken(tmp_path: Path, shards: Callable[..., Shards]) -> None:
    opened = shards([8], max_open=10, mappable_bytes=8)
    assert opened.find([((0, 0), 0)] * 2) == [None] * 2
    assert open_files(tmp_path) == 0


def test_where_a_file_cannot_be_mapped_it_is_read(
    tmp_path: Path, shards: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = find(shards([8], max_open=10, mappable_bytes=8), tmp_path, 0)
    monkeypatch.setattr(mmap, "mmap", raise_no_device)
    assert [content(shard, was_read=True) for _ in range(2)] == [(tmp_path / "0").read_bytes()] * 2
    assert shard.mapping is None


def raise_no_device(*_: object, **__: object) -> None:
    raise OSError(errno.ENODEV, "this file system cannot map")


@pytest.mark.parametrize("is_cold", [False, True])
def test_where_pages_do_not_stay_in_memory_nothing_stays_mapped(tmp_path: Path, is_cold: bool) -> None:
    count, length = 64, 32 * 1024
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(count * length))
    content, status = path.read_bytes(), path.stat()
    pool = BufferPool()
    records = pool.lend((count, length), np.uint8)
    starts = np.arange(count) * length
    with closing(Helper()) as helper, open(path, "rb") as file:
        task = Task(
            memory=(pool.identity, pool.descriptor, pool.num_bytes),
            shards=(((status.st_dev, status.st_ino), file.fileno()),),
            which=np.zeros(count, dtype=np.int64),
            offsets=starts.astype(np.uint64),
            places=starts,
            lengths=np.full(count, length),
            checksums=np.array([checksum(memoryview(content)[start : start + length]) for start in starts], np.uint64),
            were_read=np.ones(count, dtype=np.bool_),
        )
        if is_cold and evict([path]) > 0:
            pytest.skip("the files here cannot be thrown out of memory")
        deadline = time.monotonic() + 30
        while not helper.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer = helper.read(task)
        assert answer.is_right.all()
        assert answer.is_missing == is_cold
        assert records.tobytes() == content
        again = helper.read(replace(task, were_read=np.zeros(count, dtype=np.bool_)))
        assert again.is_right.all()
        assert not again.is_missing
        assert helper._process is not None
        assert (str(path) in maps(helper._process.pid)) != is_cold


def test_a_process_ends_with_its_parent_although_a_fork_keeps_its_pipes(packed_dir: Path) -> None:
    program = f"""
import os, time
from shards.reading import stream
from shards.reading.reader import ShardReader
from tests.shards.reading.test_helpers import CONFIG, processes
stream.HELP_AFTER_BYTES = 0
with stream.TrialStream(ShardReader({str(packed_dir)!r}), CONFIG) as trials:
    print(*processes(trials), flush=True)
    sleeper = os.fork()
    if not sleeper:
        os.close(1)
        time.sleep(60)
    print(sleeper, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        found = [int(word) for word in parent.stdout.readline().split()]
        sleeper = int(parent.stdout.readline())
        parent.kill()
    try:
        assert_gone(found)
        assert is_running(sleeper)
    finally:
        os.kill(sleeper, signal.SIGKILL)
