"""Made-up data with samples of NSD's size for the training benchmark: real numbers of voxels, a real target shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.comm import Comm
from nd_dist.config import Config, DataConfig, PhantomConfig
from nd_dist.events import EventLog
from nd_dist.schema import TargetSpec, role_of
from nd_dist.seeds import unit_seed
from shards.pack import pack
from shards.phantom.write import write_phantom

SHAPES: dict[str, tuple[int, ...]] = {"c": (77, 768), "z": (4, 64, 64), "g02": (50, 768)}
NUM_SUBJECTS = 4


class RandomTargets:
    """A ``TargetExtractor``: noise of the published shape, keyed by image.

    Args:
        name: The target.
        shape: Its shape.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.specs = (TargetSpec(name, role_of(name), shape),)
        self.fingerprint: Mapping[str, object] = {"benchmark": list(shape)}

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str],
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return the target of each image."""
        spec = self.specs[0]
        generators = [np.random.default_rng(unit_seed(0, image_id)) for image_id in image_ids]
        return {spec.name: np.stack([each.standard_normal(spec.shape, dtype=np.float32) for each in generators])}


def make_data(folder: Path, target: str, shape: tuple[int, ...], num_voxels: int) -> Config:
    """Write and pack a phantom once per folder; return a recipe that names its shards.

    Args:
        folder: Where to.
        target: The one target.
        shape: Its shape.
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
        pack(config, Comm(), EventLog(folder / "pack", 0, "pack"), RandomTargets(target, shape))
    return config
