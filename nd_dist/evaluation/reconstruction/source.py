"""What an evaluation reads: a protocol that ``shards.ShardReader`` fulfils without this package knowing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nd_dist.schema import Split, TwoRepeats


class SourceIndex(Protocol):
    """What a source is."""

    @property
    def id(self) -> str:
        """Hash of the content."""
        ...


class Source(Protocol):
    """Voxels, targets and pictures of packed shards."""

    @property
    def index(self) -> SourceIndex:
        """Index of the shards; its id is part of every result's fingerprint."""
        ...

    def images(self, subject: int, split: Split) -> list[int]:
        """Return a subject's image ids of a split, ascending."""
        ...

    def voxels(
        self, subject: int, image_ids: Sequence[int], *, two_repeats: TwoRepeats = "mean"
    ) -> npt.NDArray[np.float32]:
        """Return z-scored betas (N, V), averaged over the repeats of each image; two as ``two_repeats`` says."""
        ...

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target of each image, (N, *shape)."""
        ...

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return the pictures (N, H, W, 3)."""
        ...
