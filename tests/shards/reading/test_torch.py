"""The stream in torch's own machinery: loaders, worker processes, forks, and the loops of the documentation."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset

from nd_dist.errors import ConfigError
from nd_dist.schema import Batch
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from tests.shards.support import ROOT
from tests.support.documents import programs

TIMEOUT_S = 120
PROGRAMS = programs("torch.md")


def make_stream(folder: Path, **changes: object) -> TrialStream:
    config = StreamConfig(subjects=(1, 2), targets=("z",), samples_per_subject=5, seed=3, **changes)  # type: ignore[arg-type]
    return TrialStream(ShardReader(folder), config)


def content(batch: Batch) -> tuple[object, ...]:
    tensors = (*batch.voxels.values(), *batch.targets.values())
    return batch.step, batch.trial.tolist(), *(tensor.numpy().tobytes() for tensor in tensors)


@pytest.fixture
def right(packed_dir: Path) -> list[tuple[object, ...]]:
    with make_stream(packed_dir) as stream:
        return [content(batch) for batch in islice(stream, 6)]


@pytest.mark.parametrize("loader", [DataLoader, webdataset.WebLoader])
def test_loaders_deliver_a_stream_as_it_is(packed_dir: Path, right: list[tuple[object, ...]], loader: type) -> None:
    with make_stream(packed_dir) as stream:
        assert isinstance(stream, IterableDataset)
        assert [content(batch) for batch in islice(loader(stream, batch_size=None), 6)] == right
        assert stream.step == 6


@pytest.mark.parametrize(
    ("loader", "workers", "start", "is_used"),
    [
        (DataLoader, 1, "fork", False),
        (DataLoader, 2, "fork", True),
        (DataLoader, 2, "spawn", True),
        (webdataset.WebLoader, 2, "fork", True),
    ],
)
def test_worker_processes_are_refused_with_the_reason(
    packed_dir: Path, loader: type, workers: int, start: str, is_used: bool
) -> None:
    with make_stream(packed_dir) as stream:
        if is_used:
            next(stream)
        loading = loader(
            stream, batch_size=None, num_workers=workers, multiprocessing_context=start, timeout=TIMEOUT_S
        )
        with pytest.raises(ConfigError, match=r"each would deliver every batch(.|\n)*num_workers=0"):
            next(iter(loading))
        assert next(stream).step == int(is_used)


def send_steps(stream: TrialStream, results: multiprocessing.Queue[list[tuple[object, ...]]], count: int) -> None:
    """Send what a stream delivers in this process."""
    with stream:
        results.put([content(batch) for batch in islice(stream, count)])


@pytest.mark.parametrize(("start", "used"), [("fork", 0), ("fork", 2), ("spawn", 2)])
def test_a_forked_or_spawned_process_goes_on_from_the_same_step(
    packed_dir: Path, right: list[tuple[object, ...]], start: str, used: int
) -> None:
    context = multiprocessing.get_context(start)
    results = context.Queue()
    with make_stream(packed_dir, threads=3) as stream:
        assert [content(batch) for batch in islice(stream, used)] == right[:used]
        process = context.Process(target=send_steps, args=(stream, results, 3))
        process.start()
        found = results.get(timeout=TIMEOUT_S)
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
        assert found == right[used : used + 3]
        assert content(next(stream)) == right[used], "the parent's own stream stays where it was"


def test_a_batch_moves_to_a_device_with_all_its_tensors(packed_dir: Path) -> None:
    with make_stream(packed_dir, split="test", pictures=True) as stream:
        moved = (batch := next(stream)).to("meta")
    tensors = (*moved.voxels.values(), *moved.targets.values(), moved.pictures)
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    assert moved.voxels.keys() == batch.voxels.keys()
    assert moved.trial is batch.trial
    assert moved.step == batch.step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_is_pinned_by_a_loader_and_arrives_whole(packed_dir: Path, right: list[tuple[object, ...]]) -> None:
    with make_stream(packed_dir) as stream:
        batches = list(islice(DataLoader(stream, batch_size=None, pin_memory=True), 6))
        assert all(tensor.is_pinned() for batch in batches for tensor in batch.voxels.values())
        assert [content(batch.to("cuda").to("cpu")) for batch in batches] == right


def run_program(name: str, folder: Path, *launcher: str, steps: int = 0) -> list[str]:
    """Run a program of the documentation in a folder, with another number of steps, and return what it prints."""
    text = PROGRAMS[name].replace('STEPS = Path("state.pt"), 40', f'STEPS = Path("state.pt"), {steps or 40}')
    (folder / name).write_text(text, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, *launcher, name],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line]


@pytest.fixture
def folder_with_shards(packed_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "shards").symlink_to(packed_dir)
    return tmp_path


@pytest.mark.launch
def test_the_documented_loop_learns_and_goes_on_where_it_stopped(folder_with_shards: Path) -> None:
    torch.manual_seed(0)
    first = run_program("loop.py", folder_with_shards, steps=20)
    assert [line.split()[1] for line in first] == [str(step) for step in range(20)]
    second = run_program("loop.py", folder_with_shards)
    assert [line.split()[1] for line in second] == [str(step) for step in range(20, 40)]
    losses = [float(line.split()[-1]) for line in first + second]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.launch
def test_the_documented_ddp_loop_trains_what_one_process_trains(folder_with_shards: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    one, two = (run_program("ddp.py", folder_with_shards, *launcher, str(ranks)) for ranks in (1, 2))
    losses = [[float(line.split()[-1]) for line in lines] for lines in (one, two)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_documented_loader_delivers_batches(folder_with_shards: Path) -> None:
    lines = run_program("loader.py", folder_with_shards)
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
