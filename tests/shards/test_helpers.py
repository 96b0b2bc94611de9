from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from nd_dist.errors import DataError
from nd_dist.schema import Batch
from shards import stream as stream_module
from shards.codec import trial_shard_path
from shards.helpers import can_help
from shards.reader import ShardReader
from shards.records import ShardFiles
from shards.stream import StreamConfig, TrialStream
from tests.shards.support import flip_byte

pytestmark = pytest.mark.skipif(not can_help(), reason="here no process can read its parent's open files")
CONFIG = StreamConfig(subjects=(1, 2, 3), targets=("z", "c"), samples_per_subject=12, seed=5)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader processes from the first step on."""
    monkeypatch.setattr(stream_module, "HELP_AFTER_BYTES", 0)


def values(batch: Batch) -> tuple[bytes, ...]:
    return tuple(part.numpy().tobytes() for part in (*batch.voxels.values(), *batch.targets.values()))


def read(folder: Path, count: int) -> list[tuple[bytes, ...]]:
    with TrialStream(ShardReader(folder), CONFIG) as stream:
        return [values(batch) for batch in islice(stream, count)]


def processes(stream: TrialStream) -> list[int]:
    """Return the ids of the reader processes that wait for work."""
    return [helper._process.pid for helper in stream._helpers if helper._process is not None]


def wait_for(stream: TrialStream) -> list[int]:
    deadline = time.monotonic() + 20
    while not (found := processes(stream)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_read_what_threads_read(packed_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_threads = read(packed_dir, 40)
    monkeypatch.setattr(stream_module, "HELP_AFTER_BYTES", 0)
    assert read(packed_dir, 40) == by_threads


def test_records_are_read_by_the_processes(packed_dir: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardFiles, "_read_here", lambda *_: pytest.fail("a record was left to the parent"))
    assert len(read(packed_dir, 10)) == 10


def test_a_process_that_dies_costs_nothing_but_time(packed_dir: Path, at_once: None) -> None:
    expected = read(packed_dir, 30)
    with TrialStream(ShardReader(packed_dir), CONFIG) as stream:
        found = [values(batch) for batch in islice(stream, 10)]
        for process in wait_for(stream):
            os.kill(process, signal.SIGKILL)
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
        next(stream)
        found = wait_for(stream)
    assert found
    assert not any(is_running(process) for process in found)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent_and_outlive_a_ctrl_c(packed_dir: Path, kind: signal.Signals) -> None:
    program = f"""
import sys, time
from shards import stream
from shards.reader import ShardReader
from tests.shards.test_helpers import CONFIG, wait_for
stream.HELP_AFTER_BYTES = 0
with stream.TrialStream(ShardReader({str(packed_dir)!r}), CONFIG) as trials:
    next(trials)
    print(*wait_for(trials), flush=True)
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


def test_where_no_process_can_start_the_threads_read(monkeypatch: pytest.MonkeyPatch, packed_dir: Path) -> None:
    monkeypatch.setattr(stream_module, "HELP_AFTER_BYTES", 0)
    expected = read(packed_dir, 5)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert read(packed_dir, 5) == expected
