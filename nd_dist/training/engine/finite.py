"""Stopping at a loss or gradient that is not finite: which step, which ranks, whose samples."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed

from nd_dist.errors import NdDistError
from nd_dist.schema import Batch
from nd_dist.world import World

MAX_NAMED = 12


class NonFiniteError(NdDistError):
    """A loss or gradient became NaN or infinite; no parameter was changed by that step."""

    exit_code = 1


def raise_not_finite(what: str, step: int, batch: Batch, world: World, is_bad: bool) -> NoReturn:
    """Raise on every rank, naming the ranks whose value is not finite and their samples. Every rank calls it.

    Args:
        what: "loss" or "gradient".
        step: Optimizer step that was not made.
        batch: This rank's batch.
        world: Who this rank is.
        is_bad: Whether this rank's own value is not finite.

    Raises:
        NonFiniteError: always.
    """
    reports: list[Any] = [None] * world.size
    distributed.all_gather_object(reports, {"rank": world.rank, **suspects(batch)} if is_bad else None)
    bad = [report for report in reports if report is not None]
    raise NonFiniteError(
        f"The {what} is not finite at step {step}; training stopped before the optimizer step.",
        where="; ".join(f"rank {r['rank']}: subjects {r['subjects']}, images {r['images']} ({r['why']})" for r in bad),
        found=f"a {what} of NaN or infinity on {len(bad)} of {world.size} ranks",
        todo="look at these samples (`nd verify` checks the shards); the last checkpoint is good, "
        "the same command continues from it, with a lower training.learning_rate or training.gradient_clip set if "
        "the samples are fine",
    )


def suspects(batch: Batch) -> dict[str, Any]:
    """Return subjects and image ids of the rows whose voxels or targets are not finite; of all rows where none is."""
    finite = np.ones(len(batch), dtype=bool)
    if batch.voxels:
        finite = torch.cat([torch.isfinite(v).flatten(1).all(dim=1) for v in batch.voxels.values()]).cpu().numpy()
    for target in batch.targets.values():
        finite &= torch.isfinite(target).flatten(1).all(dim=1).cpu().numpy()
    rows = ~finite if not finite.all() else np.ones(len(batch), dtype=bool)
    images = sorted({int(image) for image in batch.image_id[rows]})
    return {
        "subjects": sorted({int(subject) for subject in batch.subject[rows]}),
        "images": images[:MAX_NAMED] + (["..."] if len(images) > MAX_NAMED else []),
        "why": "inputs are finite" if finite.all() else "their voxels or targets are not finite",
    }
