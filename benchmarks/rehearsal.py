"""One subject at NSD's true size through the packer: made up in NSD's own files, packed, verified, streamed.

    python -m benchmarks.rehearsal                     3 sessions of 750 trials, grid 81 x 104 x 83, 15,724 voxels
    python -m benchmarks.rehearsal --nifti             betas as gzipped NIfTI (slower to read, as on the real files)
    python -m benchmarks.rehearsal --dir /data/scratch --ranks 2

Every stage runs in processes of its own; peak memory is that of its largest process. Only the network's work is left
out: targets have their true shapes, but are made up. Bar: less than 2 GB a rank.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import h5py
import nibabel
import numpy as np
import scipy.io

from benchmarks.support.memory import peak_memory
from benchmarks.support.shards import PICTURE, SUBJECT_VOXELS, MadeUpExtractor
from nd_dist.comm import connect
from nd_dist.config import Config, DataConfig
from nd_dist.events import EventLog
from nd_dist.schema import TARGETS
from nd_dist.world import World
from shards.packing.pack import pack
from shards.packing.plan import plan_pack
from shards.reading.reader import ShardReader
from shards.reading.stream import StreamConfig, TrialStream
from shards.sources.nsd_layout import NsdLayout
from shards.upkeep.verify import verify

GRID, TRIALS, IMAGES, SHARED = (81, 104, 83), 750, 750, 40
BETAS = "betas_fithrf_GLMdenoise_RR"


def config_of(folder: Path) -> Config:
    """Return the recipe of the rehearsal."""
    data = DataConfig(subjects=(1,), pictures="test", captions=str(folder / "nsd/captions"))
    return Config(nsd_root=folder / "nsd", shards_dir=folder / "shards", run_dir=folder / "run", data=data)


def make(folder: Path, sessions: int, is_nifti: bool) -> None:
    """Write the files of one subject: design, ROI, betas, pictures, captions."""
    layout = NsdLayout(folder / "nsd")
    rng = np.random.default_rng(0)
    for path in (layout.expdesign, layout.stimuli, layout.roi(1, "x"), layout.betas(1, BETAS, 1, ".hdf5")):
        path.parent.mkdir(parents=True, exist_ok=True)
    order = rng.permutation(np.resize(np.arange(1, IMAGES + 1), sessions * TRIALS))
    content = {
        "masterordering": order,
        "subjectim": np.arange(1, IMAGES + 1)[None],
        "sharedix": np.arange(1, SHARED + 1),
    }
    scipy.io.savemat(layout.expdesign, {**content, "stimpattern": np.ones((sessions, 1, TRIALS))})
    labels = np.zeros(GRID, dtype=np.int16)
    centre = np.array(GRID)[:, None, None, None] / 2
    inner = np.flatnonzero(np.abs(np.indices(GRID) - centre).sum(axis=0) < 70)
    labels.flat[rng.choice(inner, SUBJECT_VOXELS, replace=False)] = 1
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), layout.roi(1, "nsdgeneral"))
    for session in range(1, sessions + 1):
        if is_nifti:
            volumes = rng.integers(-3000, 3000, (*GRID, TRIALS), dtype=np.int16)
            nibabel.save(nibabel.Nifti1Image(volumes, np.eye(4)), layout.betas(1, BETAS, session, ".nii.gz"))
            continue
        with h5py.File(layout.betas(1, BETAS, session, ".hdf5"), "w") as file:
            # NSD's chunks hold all trials of one voxel; those outside the ROI are left unwritten
            betas = file.create_dataset("betas", (TRIALS, *GRID[::-1]), "<i2", chunks=(TRIALS, 1, 1, 1))
            for x, y, z in np.argwhere(labels > 0):
                betas[:, z, y, x] = rng.integers(-3000, 3000, TRIALS, dtype=np.int16)
    with h5py.File(layout.stimuli, "w") as file:
        file["imgBrick"] = rng.integers(0, 255, (IMAGES, *PICTURE), dtype=np.uint8)
    with open(layout.stim_info, "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["", "cocoId", "cocoSplit", "nsdId", "shared1000"])
        rows.writerows([i, i, "train2017", i, i < SHARED] for i in range(IMAGES))
    (folder / "nsd/captions").mkdir()
    for split, ids in (("train2017", range(IMAGES)), ("val2017", range(0))):
        annotations = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in ids]
        (folder / f"nsd/captions/captions_{split}.json").write_text(json.dumps({"annotations": annotations}))


def stage(name: str, folder: Path) -> None:
    """Do one stage in this process and write its seconds and peak memory."""
    config, world = config_of(folder), World.from_env(os.environ)
    comm = connect(world)
    started, note = time.perf_counter(), ""
    if name == "pack":
        index = pack(config, comm, EventLog(config.run_dir, world.rank, "pack"), MadeUpExtractor())
        planned = {shard.path: shard.num_bytes for shard in plan_pack(config, MadeUpExtractor().specs).shards}
        exact = [shard for shard in index.shards if shard.kind != "img"]
        assert all(planned[shard.path] == shard.bytes for shard in exact), "the plan's bytes are exact"
        kinds = {
            kind: sum(s.bytes for s in index.shards if s.kind == kind) / 1e6 for kind in ("trials", "c", "z", "g02")
        }
        note = ", ".join(f"{kind} {size:.1f} MB" for kind, size in kinds.items()) + ", as planned to the byte"
    elif name == "verify":
        problems = verify(config.shards_folder)
        assert problems == [], problems[:3]
        note = "every hash, table, count, mean and deviation"
    else:
        reader = ShardReader(config.shards_folder)
        with TrialStream(reader, StreamConfig((1,), TARGETS, 42, 0)) as stream:
            steps = stream.num_items[1] // 42
            samples = sum(len(batch) for batch in islice(stream, steps))
        note = f"one pass, {samples} samples, all targets, float32"
    seconds = time.perf_counter() - started
    peak = peak_memory()
    result = {"seconds": seconds, "peak": peak, "note": note}
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(result))
    comm.finish()


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--nifti", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--stage", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage[0], Path(options.stage[1]))
        return
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="nd-rehearsal-") as name:
        folder = Path(name)
        started = time.perf_counter()
        make(folder, options.sessions, options.nifti)
        print(f"made up in {time.perf_counter() - started:.0f} s; load {os.getloadavg()[0]:.1f}", flush=True)
        print(f"{'stage':8s} {'seconds':>8s} {'peak MB a rank':>15s}")
        for kind in ("pack", "verify", "stream"):
            program = [sys.executable, "-m", "benchmarks.rehearsal", "--stage", kind, name]
            ranks = options.ranks if kind == "pack" else 1
            mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if ranks > 1 else []
            subprocess.run([*mpirun, *program], check=True)
            results = [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(ranks)]
            peak = max(result["peak"] for result in results)
            print(f"{kind:8s} {results[0]['seconds']:8.1f} {peak / 1e6:15.0f}   {results[0]['note']}", flush=True)
            if peak >= 2e9:
                sys.exit("MISSED: less than 2 GB a rank")
        print("met: less than 2 GB a rank")


if __name__ == "__main__":
    main()
