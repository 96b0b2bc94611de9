"""How long packing will take: packs a little of the real data into a temporary folder and scales its time up."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nd_dist.config import Config
from nd_dist.events import EventLog
from shards.packing.packer import Packer
from shards.packing.plan import ImageUnit, PackPlan, TrialUnit, plan
from shards.packing.targets import TargetExtractor
from shards.sources.open import open_reader

SAMPLE_IMAGES = 4


@dataclass(frozen=True)
class PackEstimate:
    """Seconds of one rank.

    Args:
        trials_s: Reading, z-scoring and writing all trials.
        images_s: Extracting and writing all targets and pictures; NaN where no network was at hand.
    """

    trials_s: float
    images_s: float

    def describe(self, ranks: int) -> str:
        """Return one line for people."""
        total_s = (self.trials_s + np.nan_to_num(self.images_s)) / ranks
        what = f"trials {self.trials_s / 60:.1f}"
        if np.isnan(self.images_s):
            what += ", targets not counted"
        elif self.images_s:
            what += f", targets and pictures {self.images_s / 60:.1f}"
        return (
            f"about {total_s / 60:.1f} minutes on {ranks} rank(s), if they do not slow each other "
            f"({what} minutes of one rank, scaled up from a sample packed on this machine)"
        )


def estimate_pack(config: Config, extractor: TargetExtractor | None) -> PackEstimate:
    """Return how long packing takes one rank, from one session of one subject and a few images.

    Args:
        config: The recipe.
        extractor: Makes targets; without it only trials are timed.

    Raises:
        DataError: data is missing or damaged.
    """
    if extractor is None:
        data = config.data.model_copy(update={"targets": (), "int8_targets": (), "pictures": "none"})
        config = config.model_copy(update={"data": data})
    with tempfile.TemporaryDirectory(prefix="nd-estimate-") as folder:
        place = config.model_copy(update={"shards_dir": Path(folder) / "shards", "run_dir": Path(folder)})
        reader = open_reader(place)
        makes: Any = extractor or SimpleNamespace(specs=(), fingerprint={})  # Any: stands for one that makes no target
        whole = plan(place.data, reader, makes.specs)
        packer = Packer(place, reader, whole, makes, EventLog(Path(folder), 0, "pack"))
        trials_s = _time_trials(packer, whole)
        return PackEstimate(trials_s, _time_images(packer, whole) if extractor is not None else float("nan"))


def _time_trials(packer: Packer, whole: PackPlan) -> float:
    """Return the seconds of all trials, scaled up by values from one session."""
    unit = next(unit for unit in whole.units if isinstance(unit, TrialUnit))
    design = whole.designs[unit.subject]
    sample = len(design.trials_of(unit.session)) * design.num_voxels
    if not packer.scheme.per_session:
        packer.subject_moments[unit.subject] = packer.fit_subject(unit.subject, [unit.session])
    started = time.perf_counter()
    packer.run([unit], set())
    seconds = time.perf_counter() - started
    values = sum(design.num_trials * design.num_voxels for design in whole.designs.values())
    passes = 1 if packer.scheme.per_session else 2  # by-subject statistics read the betas once more
    return seconds * passes * values / sample


def _time_images(packer: Packer, whole: PackPlan) -> float:
    """Return the seconds of all images, scaled up from a few after a first one that warms the networks up."""
    units = whole.image_units
    if not units:
        return 0.0
    unit = units[0]
    packer.run([ImageUnit(unit.group, unit.number, unit.image_ids[:1], unit.stores)], set())
    ids = unit.image_ids[:SAMPLE_IMAGES]
    started = time.perf_counter()
    packer.run([ImageUnit(unit.group, unit.number, ids, unit.stores)], set())
    seconds = (time.perf_counter() - started) / len(ids)
    return seconds * sum(len(unit.image_ids) for unit in units)
