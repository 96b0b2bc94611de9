"""What makes targets out of pictures and captions: a protocol, so that the packer knows no network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nd_dist.schema import TargetSpec


class TargetExtractor(Protocol):
    """Frozen networks behind one call; equal inputs in equal batches must give equal bits."""

    @property
    def specs(self) -> tuple[TargetSpec, ...]:
        """The targets that ``extract`` returns."""

    @property
    def fingerprint(self) -> Mapping[str, object]:
        """JSON facts on which the targets depend: models, revisions, options. Never a path or a time."""

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str],
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return target name -> (B, *shape) float32, of the wanted targets at least.

        Args:
            pictures_BHWC: Pictures, 0..255.
            captions: Every picture's captions; empty where no caption target is wanted.
            image_ids: Every picture's id, which seeds what is random.
            wanted: Names of the targets to make; networks that none of them needs should not run.
        """
