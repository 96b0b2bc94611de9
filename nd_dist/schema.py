"""The data contract: names, shapes and units of what flows from shards to models and on to the sampler.

Legend of shape suffixes: B batch, V voxels of one subject, L tokens, D width, C channels, H height, W width.
Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # names and shapes only: importing this file stays cheap
    import numpy as np
    import numpy.typing as npt
    import torch

Role = Literal["semantic", "initial", "guidance"]
Split = Literal["train", "test"]
TwoRepeats = Literal["mean", "official"]  # of two repeats a, b of an image: their mean, or (2 a + b) / 3

SEMANTIC = "c"
INITIAL = "z"
NUM_GUIDANCE_LAYERS = 6


def guidance_name(block: int) -> str:
    """Return the target name of CLIP vision block ``block`` (0-based): 0 -> ``g02`` (the paper's Linear-2)."""
    return f"g{2 * (block + 1):02d}"


GUIDANCE = tuple(guidance_name(block) for block in range(NUM_GUIDANCE_LAYERS))
TARGETS = (SEMANTIC, INITIAL, *GUIDANCE)


@dataclass(frozen=True)
class TargetSpec:
    """One target that a head predicts: semantic ``c``, initial ``z`` or guidance ``g02`` .. ``g12``.

    Args:
        name: One of ``TARGETS``; also the name of its store in the shards.
        role: What the sampler uses it for.
        shape: Shape of one image's target: (L, D) for tokens, (C, H, W) for the latent.
    """

    name: str
    role: Role
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values of one image's target."""
        return prod(self.shape)


def role_of(name: str) -> Role:
    """Return the role of a target name (see ``TARGETS``)."""
    return "semantic" if name == SEMANTIC else "initial" if name == INITIAL else "guidance"


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global training step. Rows are ordered by subject, then by position in its quota.

    Args:
        step: Global step that this batch belongs to (0-based).
        voxels: subject -> (B_s, V_s) float16 or float32, z-scored betas.
        targets: target name -> (B, *shape) float16 or float32, rows in the order of ``voxels``' subjects.
        subject, session, trial, image_id, repeat: (B,) int64, what each row is.
        sample_id: (B,) int64, position of the row in the *global* batch: keys its random draws on any world size.
        data_wait_s: Seconds that the consumer waited for this batch.
        pictures: (B, H, W, 3) uint8, only where they were asked for.
    """

    step: int
    voxels: Mapping[int, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    subject: npt.NDArray[np.int64]
    session: npt.NDArray[np.int64]
    trial: npt.NDArray[np.int64]
    image_id: npt.NDArray[np.int64]
    repeat: npt.NDArray[np.int64]
    sample_id: npt.NDArray[np.int64]
    data_wait_s: float = field(default=0.0, compare=False)
    pictures: torch.Tensor | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Return the number of rows B."""
        return len(self.subject)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on a device; what each row is stays on the host.

        Args:
            device: Where to.
            non_blocking: Do not wait for copies from page-locked memory; this batch must then be kept until they are
                done, as its memory is used again.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory; a ``DataLoader(pin_memory=True)`` calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with changed tensors."""
        return replace(
            self,
            voxels={subject: change(tensor) for subject, tensor in self.voxels.items()},
            targets={name: change(tensor) for name, tensor in self.targets.items()},
            pictures=None if self.pictures is None else change(self.pictures),
        )
