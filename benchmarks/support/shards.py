"""Made-up data in NSD's true shapes, and ways to measure reading: a table, a file server."""

from __future__ import annotations

import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config, DataConfig, FrozenConfig
from nd_dist.schema import TARGETS, TargetSpec, role_of
from shards.sources.contract import SubjectDesign

SHAPES = {"c": (77, 768), "z": (4, 64, 64), **{f"g{block:02d}": (50, 768) for block in range(2, 13, 2)}}
SUBJECT_VOXELS = 15_724
PICTURE = (425, 425, 3)


def made_up(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return noise, cheaply: a fixed block of normal numbers, read from an offset that follows from the seed."""
    size = int(np.prod(shape))
    start = (seed * 7919) % 65_536
    return np.resize(_NOISE[start:], size).reshape(shape)


_NOISE = np.random.default_rng(0).normal(size=1 << 21).astype(np.float32)


class MadeUpExtractor:
    """Targets in the true shapes, made up from the image id."""

    def __init__(self, targets: Sequence[str] = TARGETS) -> None:
        self.specs = tuple(TargetSpec(name, role_of(name), SHAPES[name]) for name in targets)
        self.fingerprint: Mapping[str, object] = {"extractor": "made up"}

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return noise."""
        del pictures_BHWC, captions, wanted
        return {
            spec.name: np.stack([made_up(image_id + 31 * k, spec.shape) for image_id in image_ids])
            for k, spec in enumerate(self.specs)
        }


@dataclass
class MadeUpReader:
    """One subject, every image three times.

    Args:
        num_images: Distinct images; there are three times as many trials.
        trials_per_session: Trials of a session.
    """

    num_images: int
    trials_per_session: int
    source: Mapping[str, object] = field(default_factory=lambda: {"reader": "made up"})

    def design(self, subject: int) -> SubjectDesign:
        """Return a design in random order; the first twentieth of the images are test images."""
        order = np.random.default_rng(subject).permutation(np.repeat(np.arange(self.num_images), 3))
        session = np.arange(len(order)) // self.trials_per_session + 1
        return SubjectDesign(
            subject, SUBJECT_VOXELS, session, order, order < self.num_images // 20, {"roi": "made up"}
        )

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return noise (T, V)."""
        num_trials = len(self.design(subject).trials_of(session))
        return made_up(session, (num_trials, SUBJECT_VOXELS)) + np.arange(num_trials, dtype=np.float32)[:, None] % 7

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return grey pictures."""
        return np.zeros((len(image_ids), *PICTURE), dtype=np.uint8)

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return one caption each."""
        return [("a picture",)] * len(image_ids)


def made_up_config(folder: Path, **data: object) -> Config:
    """Return the recipe that packs made-up data into ``folder/shards``."""
    settings: dict[str, object] = {"subjects": (1,), "pictures": "none", "images_per_shard": 128, **data}
    return Config(
        shards_dir=folder / "shards",
        run_dir=folder / "run",
        data=DataConfig(**settings),  # type: ignore[arg-type]
        frozen=FrozenConfig(batch_size=32),
    )


@dataclass(frozen=True)
class Method:
    """A way to read.

    Args:
        name: For the table.
        run: Reads once and returns (bytes, samples) delivered.
        before: Called before each run, not timed.
    """

    name: str
    run: Callable[[], tuple[int, int]]
    before: Callable[[], None] = lambda: None


def compare(methods: Sequence[Method], rounds: int, title: str) -> dict[str, dict[str, float]]:
    """Run all methods in turn, round after round, and print medians and ratios to the first of the same round."""
    load = os.getloadavg()[0]
    speeds: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    cpu_s: dict[str, list[float]] = {method.name: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            method.before()
            started, cpu = time.perf_counter(), _cpu_seconds()
            num_bytes, num_samples = method.run()
            seconds = time.perf_counter() - started
            speeds[method.name].append((num_bytes / 1e6 / seconds, num_samples / seconds))
            cpu_s[method.name].append((_cpu_seconds() - cpu) / num_bytes * 1e9)
    print(f"\n{title}: medians of {rounds} interleaved rounds; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"{'method':44s} {'MB/s':>8s} {'samples/s':>10s} {'/ first':>8s} {'spread of ratio':>16s} {'CPU s/GB':>9s}")
    first = speeds[methods[0].name]
    result = {}
    for name, values in speeds.items():
        ratios = sorted(mb / base for (mb, _), (base, _) in zip(values, first, strict=True))
        row = {
            "mb_s": statistics.median(mb for mb, _ in values),
            "samples_s": statistics.median(samples for _, samples in values),
            "ratio": statistics.median(ratios),
        }
        result[name] = row
        spread = f"{ratios[0]:.2f} .. {ratios[-1]:.2f}"
        cpu = statistics.median(cpu_s[name])
        words = f"{name:44s} {row['mb_s']:8.0f} {row['samples_s']:10.0f} {row['ratio']:8.2f} {spread:>16s} {cpu:9.2f}"
        print(words, flush=True)
    return result


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its finished children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class _Handler(BaseHTTPRequestHandler):
    """Answers GET with ranges, sending files from the kernel."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
        del format, args

    def do_GET(self) -> None:
        """Send a file, or a part of it."""
        with open(Path.cwd() / self.path.lstrip("/"), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(match[1]) if match else 0
            stop = min(int(match[2]) + 1, size) if match and match[2] else size
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.flush()
            while start < stop:
                start += os.sendfile(self.connection.fileno(), stream.fileno(), start, stop - start)


if __name__ == "__main__":  # python -m benchmarks.support.shards FOLDER PORT_FILE
    os.chdir(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Path(sys.argv[2]).write_text(str(server.server_port))
    server.serve_forever()
