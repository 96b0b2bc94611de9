"""Made-up data with samples of NSD's size for the training benchmark: real numbers of voxels, a real target shape."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.shards import MadeUpExtractor
from nd_dist.comm import Comm
from nd_dist.config import Config, DataConfig, PhantomConfig
from nd_dist.events import EventLog
from shards.packing.pack import pack
from shards.phantom.write import write_phantom

NUM_SUBJECTS = 4


def make_data(folder: Path, target: str, num_voxels: int) -> Config:
    """Write and pack a phantom once per folder; return a recipe that names its shards.

    Args:
        folder: Where to.
        target: The one target.
        num_voxels: About how many voxels a subject has.
    """
    phantom = PhantomConfig(
        num_subjects=NUM_SUBJECTS, num_sessions=2, trials_per_session=90, num_shared=6, num_voxels=num_voxels
    )
    subjects = tuple(range(1, NUM_SUBJECTS + 1))
    config = Config(
        nsd_root=folder / "nsd",
        shards_dir=folder / "shards",
        run_dir=folder / "run",
        data=DataConfig(
            subjects=subjects, targets=(target,), pictures="none", captions=str(folder / "nsd" / "captions")
        ),
        phantom=phantom,
    )
    if not (config.shards_folder / "index.json").exists():
        write_phantom(config.nsd_root, phantom, seed=0)
        pack(config, Comm(), EventLog(folder / "pack", 0, "pack"), MadeUpExtractor((target,)))
    return config
