"""What the tests of the shards share: a small real extractor, a small phantom, and ways to pack and damage it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.comm import Comm
from nd_dist.config import Config, DataConfig, FrozenConfig, PhantomConfig
from nd_dist.events import EventLog
from nd_dist.schema import TargetSpec
from shards.format.index import Index
from shards.packing.pack import pack

PHANTOM = PhantomConfig(num_subjects=3, num_sessions=4, trials_per_session=15, num_shared=4, num_voxels=50)
SEED = 11
ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
TARGETS = ("c", "z", "g02")


class PooledExtractor:
    """Targets that are cheap and really depend on picture, captions and id: pooled pixels and caption lengths."""

    specs = (
        TargetSpec("c", "semantic", (2, 3)),
        TargetSpec("z", "initial", (3, 4, 4)),
        TargetSpec("g02", "guidance", (4, 3)),
    )

    def __init__(self, **more: object) -> None:
        self.fingerprint: Mapping[str, object] = {"extractor": "pooled", "blocks": [4, 2], **more}
        self.batches: list[tuple[int, ...]] = []

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str] = TARGETS,
    ) -> dict[str, npt.NDArray[np.float32]]:
        self.batches.append(tuple(image_ids))
        lengths = [
            [[len(text), len(set(text)), image_id] for text in texts[:2]]
            for texts, image_id in zip(captions, image_ids, strict=True)
        ]
        pooled = pool(pictures_BHWC, 4).transpose(0, 3, 1, 2)
        targets = {
            "z": np.ascontiguousarray(pooled),
            "g02": pool(pictures_BHWC, 2).reshape(len(image_ids), 4, 3),
        }
        if "c" in wanted:
            targets["c"] = np.array(lengths, dtype=np.float32)
        return {name: targets[name] for name in wanted}


def pool(pictures_BHWC: npt.NDArray[np.uint8], blocks: int) -> npt.NDArray[np.float32]:
    """Return pictures averaged over blocks, (B, blocks, blocks, 3) in [0, 1]."""
    count, side = pictures_BHWC.shape[:2]
    step = side // blocks
    values = pictures_BHWC.reshape(count, blocks, step, blocks, step, 3).mean(axis=(2, 4)) / 255
    return values.astype(np.float32)


def make_config(nsd_root: Path, shards_dir: Path, **data: Any) -> Config:
    """Return the recipe that packs the small phantom."""
    settings: dict[str, Any] = {"subjects": (1, 2, 3), "targets": TARGETS, "images_per_shard": 6, **data}
    values = {
        "nsd_root": nsd_root,
        "shards_dir": shards_dir,
        "run_dir": shards_dir.parent / "run",
        "seed": SEED,
        "data": DataConfig(**settings),
        "frozen": FrozenConfig(batch_size=4),
    }
    return Config.model_validate(values, context={"command": "pack"})


def pack_alone(config: Config, extractor: PooledExtractor | None = None) -> Index:
    """Pack in this process."""
    return pack(config, Comm(), EventLog(config.run_dir, 0, "pack"), extractor or PooledExtractor())


def start_ranks(
    ranks: int, nsd_root: Path, shards_dir: Path, pause_s: float = 0.0, **data: Any
) -> subprocess.Popen[bytes]:
    """Pack with ranks of their own, each with a pause before every batch; one rank needs no mpirun."""
    words = [str(nsd_root), str(shards_dir), str(pause_s), json.dumps(data)]
    program = [sys.executable, "-m", "tests.shards.pack_program", *words]
    return subprocess.Popen(
        [str(MPIRUN), "-n", str(ranks), *program] if ranks > 1 else program,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_byte(path: Path, offset: int, mask: int = 0x41) -> None:
    """Change one byte of a file."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        value = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([value ^ mask]))
