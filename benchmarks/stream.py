"""The stream against the step it feeds, stock webdataset, the released HDF5 way, and curl over loopback HTTP.

    python -m benchmarks.stream                                  about 1 GB of made-up data in a temporary folder
    python -m benchmarks.stream --images 690 --rounds 5 --dir /data/scratch

True shapes: 15,724 voxels and all eight targets, half precision, one subject, every image three times. All methods of
a table run in turn in every round. Run it on two cores that do nothing else, one for the training and one for its
reader; the machine's load stands beside each table.

The first table asks what a stream is for: how long does a training wait for data? Its step is imitated: as many small
operations as the network's forward pass has hold the interpreter, their backward pass does not, and then the thread
waits until the step is over that a GPU's memory allows at best (AdamW and the weights move 34 bytes a parameter, an
H100 moves 3.35 TB/s; one of six ranks is given 10 ms). The wait is a share of this step without data.

Bars: data wait below 1 % with one reader thread; stream with 2 threads >= 5 x webdataset's .npy decoding
and >= 5 x the released way (samples/s); first pass over HTTP >= 0.5 of curl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
import webdataset

from benchmarks.support.shards import MadeUpExtractor, MadeUpReader, Method, compare, made_up_config
from nd_dist.comm import Comm
from nd_dist.config import RemoteConfig
from nd_dist.events import EventLog
from nd_dist.schema import TARGETS, Batch
from shards.format.index import TRIALS, Index, ShardInfo
from shards.packing.pack import pack_from
from shards.packing.plan import SHARED_GROUP
from shards.reading.reader import ShardReader
from shards.reading.stream import StreamConfig, TrialStream

BATCH = 42
FILL, FIRST_PASS = "filling the cache, sha256 checked", "stream with an empty cache, first pass"
WARM_PASSES = 10
WARM_UP, STEPS = 5, 100


@dataclass(frozen=True)
class Training:
    """A training whose step is imitated.

    Args:
        name: For the table.
        targets: What it reads.
        ranks: Among how many the global batch is divided.
        operations: Of the forward pass (those of ``training_scaling``, counted on the meta device).
        least_s: Seconds that memory traffic takes.
    """

    name: str
    targets: tuple[str, ...]
    ranks: int
    operations: int
    least_s: float


TRAININGS = (
    Training("all targets in one network (2,138 M)", TARGETS, 1, 8426, 0.0217),
    Training("all targets, one of 6 ranks", TARGETS, 6, 8426, 0.010),
    Training("c (712 M)", ("c",), 1, 1161, 0.0072),
    Training("c, one of 6 ranks", ("c",), 6, 1161, 0.0072),
)


def num_bytes(batch: Batch) -> int:
    """Return the bytes of a batch's arrays."""
    return sum(tensor.nbytes for tensor in (*batch.voxels.values(), *batch.targets.values()))


def read_stream(reader: ShardReader, threads: int, dtype: str, passes: int = 1) -> tuple[int, int]:
    """Read some passes; return bytes and samples."""
    config = StreamConfig((1,), TARGETS, BATCH, 3, threads=threads, dtype=dtype)  # type: ignore[arg-type]
    with TrialStream(reader, config) as stream:
        steps = passes * stream.num_items[1] // BATCH
        return sum(num_bytes(batch) for batch in islice(stream, steps)), steps * BATCH


def train_shards(reader: ShardReader) -> list[ShardInfo]:
    """Return the shards that a pass over the training trials reads."""
    return [shard for shard in reader.index.shards if shard.kind == TRIALS or shard.group != SHARED_GROUP]


def imitate_step(training: Training) -> None:
    """Spend a step's time as a training does: forward, backward, wait for the device."""
    end = time.perf_counter() + training.least_s
    loss = torch.zeros(1, requires_grad=True)
    for _ in range(training.operations):
        loss = loss * 1.0
    torch.autograd.backward(loss)
    time.sleep(max(0.0, end - time.perf_counter()))


def time_steps(training: Training, batches: Iterator[Batch] | None) -> tuple[float, float]:
    """Return the median milliseconds of a step, and the mean ones of waiting for its data."""
    seconds, waited_s = [], 0.0
    for _ in range(STEPS):
        started = time.perf_counter()
        if batches is not None:
            waited_s += next(batches).data_wait_s
        imitate_step(training)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3, waited_s / STEPS * 1e3


def compare_steps(reader: ShardReader, rounds: int) -> dict[str, float]:
    """Print what a step takes without data and with one reader thread; return training -> data wait as a share."""
    load = os.getloadavg()[0]
    found: dict[str, list[tuple[float, float, float]]] = {training.name: [] for training in TRAININGS}
    for _ in range(rounds):
        for training in TRAININGS:
            alone_ms, _ = time_steps(training, None)
            config = StreamConfig(
                (1,), training.targets, BATCH, 3, world_size=training.ranks, threads=1, dtype="stored"
            )
            with TrialStream(reader, config) as stream:
                for _ in islice(stream, WARM_UP):
                    pass
                found[training.name].append((alone_ms, *time_steps(training, stream)))
    print(f"\nimitated steps: medians of {rounds} rounds; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'training':44s} {'step ms':>8s} {'with data':>10s} {'data wait ms':>13s} {'share':>7s} {'worst':>7s}")
    shares = {}
    for name, values in found.items():
        alone_ms, with_ms, wait_ms = (statistics.median(column) for column in zip(*values, strict=True))
        of_rounds = sorted(wait_ms / alone_ms for alone_ms, _, wait_ms in values)
        shares[name] = statistics.median(of_rounds)
        words = f"{name:44s} {alone_ms:8.1f} {with_ms:10.1f} {wait_ms:13.3f} {shares[name]:7.2%} {of_rounds[-1]:7.2%}"
        print(words, flush=True)
    return shares


def write_inline(reader: ShardReader, folder: Path) -> list[str]:
    """Write webdataset's usual layout: every trial with all its targets, 250 trials a tar."""
    folder.mkdir()
    rows = reader.trials[reader.trials["split"] == 0]
    paths = []
    for number, start in enumerate(range(0, len(rows), 250)):
        paths.append(str(folder / f"{number:04d}.tar"))
        with webdataset.TarWriter(paths[-1]) as tar:
            for row in rows[start : start + 250]:
                voxels = np.empty((1, reader.num_voxels[1]), dtype="<f2")
                reader.read_voxels(row[None], voxels)
                sample = {"__key__": f"{row['trial']:06d}", "voxels.npy": voxels[0]}
                image = [int(row["image"])]
                targets = {f"{name}.npy": reader.targets(name, image)[0].astype(np.float16) for name in TARGETS}
                tar.write({**sample, **targets})
    return paths


def read_webdataset(paths: Sequence[str], workers: int) -> tuple[int, int]:
    """Read webdataset's usual layout in batches; return bytes and samples."""
    fields = ("voxels.npy", *(f"{name}.npy" for name in TARGETS))
    dataset = webdataset.WebDataset(list(paths), shardshuffle=False, workersplitter=webdataset.split_by_worker)
    batches = dataset.decode().to_tuple(*fields).batched(BATCH, partial=False)
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=workers)
    total = samples = 0
    for batch in loader:
        tensors = [torch.as_tensor(part) for part in batch]
        total += sum(tensor.nbytes for tensor in tensors)
        samples += len(tensors[0])
    return total, samples


def write_hdf5(reader: ShardReader, path: Path) -> None:
    """Write the released layout: contiguous single-precision targets by image."""
    ids = np.unique(reader.trials["image"]).tolist()
    with h5py.File(path, "w") as file:
        for name in TARGETS:
            file[name] = np.stack([reader.targets(name, [image_id])[0] for image_id in ids])


def read_hdf5(path: Path, image_ids: Sequence[int], voxels_TV: torch.Tensor) -> tuple[int, int]:
    """Read as the released training does: voxels in memory, targets by fancy index or row by row."""
    total = 0
    steps = len(image_ids) // BATCH
    with h5py.File(path, "r") as file:
        for step in range(steps):
            ids = np.asarray(image_ids[step * BATCH : (step + 1) * BATCH])
            order = np.argsort(ids)
            for name in TARGETS:
                if len(np.unique(ids)) == len(ids):
                    values = file[name][ids[order]][np.argsort(order)]
                else:
                    values = np.stack([file[name][image_id] for image_id in ids])
                total += torch.from_numpy(values).half().nbytes
            total += voxels_TV[step * BATCH : (step + 1) * BATCH].clone().nbytes
    return total, steps * BATCH


def serve(folder: Path, scratch: Path) -> Iterator[str]:
    """Yield the URL of a folder on a server of its own process; the second ``next`` stops it."""
    port = scratch / "port"
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.support.shards", str(folder), str(port)])
    try:
        while not (port.exists() and port.read_text()):
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text()}"
    finally:
        server.terminate()
        server.wait()
        port.unlink(missing_ok=True)


def curl(url: str, names: Sequence[str], sink: Path | None) -> None:
    """Fetch files with one ``curl``, to a folder or to nowhere."""
    words = []
    for number, name in enumerate(names):
        words += ["-o", str(sink / str(number)) if sink else "/dev/null", f"{url}/{name}"]
    subprocess.run(["curl", "--silent", "--fail", *words], check=True)


def run_http(reader: ShardReader, scratch: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Compare the first pass over HTTP with curl."""
    used = train_shards(reader)
    total = sum(shard.bytes for shard in used)
    names = [shard.path for shard in used]
    cache, sink = scratch / "cache", scratch / "curl"

    def clear() -> None:
        for folder in (cache, sink):
            shutil.rmtree(folder, ignore_errors=True)
        sink.mkdir()

    for url in serve(scratch / "shards", scratch):

        def fill(url: str = url) -> tuple[int, int]:
            store = Index.read(url, RemoteConfig(cache_dir=cache)).store
            return sum(file.bytes for file in store.prefetch(used)), 0

        def first_pass(url: str = url) -> tuple[int, int]:
            return read_stream(ShardReader(url, RemoteConfig(cache_dir=cache)), 2, "stored")

        def fetch(sink: Path | None, url: str = url) -> tuple[int, int]:
            curl(url, names, sink)
            return total, 0

        methods = [
            Method("curl to a folder", partial(fetch, sink), clear),
            Method("curl to /dev/null", partial(fetch, None), clear),
            Method(FILL, fill, clear),
            Method(FIRST_PASS, first_pass, clear),
        ]
        return compare(methods, rounds, f"loopback HTTP, {total / 1e6:.0f} MB on the wire")
    raise AssertionError("the server yields once")


def main() -> None:
    """Make data up, run the three tables and say which bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=420)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="nd-bench-") as name:
        scratch = Path(name)
        config = made_up_config(scratch)
        source = MadeUpReader(options.images, trials_per_session=250)
        pack_from(source, config, Comm(), EventLog(config.run_dir, 0, "pack"), MadeUpExtractor())
        reader = ShardReader(config.shards_folder)
        paths = [config.shards_folder / shard.path for shard in train_shards(reader)]
        inline = write_inline(reader, scratch / "inline")
        write_hdf5(reader, scratch / "targets.hdf5")
        rows = reader.trials[reader.trials["split"] == 0]
        ids = np.random.default_rng(0).permutation(rows["image"]).tolist()
        voxels_TV = torch.zeros(len(ids), reader.num_voxels[1], dtype=torch.float16)
        size = sum(path.stat().st_size for path in paths)
        print(f"{size / 1e6:.0f} MB in {len(paths)} shards, {len(ids)} trials a pass")
        step_rows = compare_steps(reader, options.rounds)
        warm = [
            Method("released HDF5 way", lambda: read_hdf5(scratch / "targets.hdf5", ids, voxels_TV)),
            Method("webdataset .npy decode, 0 workers", lambda: read_webdataset(inline, 0)),
            Method("webdataset .npy decode, 2 workers", lambda: read_webdataset(inline, 2)),
            Method("stream, 1 thread, stored dtype", lambda: read_stream(reader, 1, "stored", WARM_PASSES)),
            Method("stream, 2 threads, stored dtype", lambda: read_stream(reader, 2, "stored", WARM_PASSES)),
            Method("stream, 2 threads, float32", lambda: read_stream(reader, 2, "float32", WARM_PASSES)),
        ]
        for method in warm:
            method.run()
        warm_rows = compare(warm, options.rounds, "reading alone, from memory")
        http_rows = run_http(reader, scratch, options.rounds)
    _judge(step_rows, warm_rows, http_rows)


def _judge(steps: dict[str, float], warm: dict[str, dict[str, float]], http: dict[str, dict[str, float]]) -> None:
    """Print every bar with what was measured."""
    for name, share in steps.items():
        print(f"{'met   ' if share < 0.01 else 'MISSED'} data wait, {name:44s} {share:6.2%} (bar 1 %)")
    rate = warm["stream, 2 threads, stored dtype"]["samples_s"]
    webdataset_rate = max(row["samples_s"] for name, row in warm.items() if name.startswith("webdataset"))
    bars = [
        ("x webdataset .npy (its better one)", rate / webdataset_rate, 5.0),
        ("x released HDF5 way", rate / warm["released HDF5 way"]["samples_s"], 5.0),
        ("HTTP, filling the cache, of curl to a folder", http[FILL]["ratio"], 0.5),
        ("HTTP, first pass (delivered), of curl to a folder", http[FIRST_PASS]["ratio"], 0.5),
    ]
    for name, found, wanted in bars:
        print(f"{'met   ' if found >= wanted else 'MISSED'} {name:55s} {found:6.2f} (bar {wanted})")


if __name__ == "__main__":
    main()
