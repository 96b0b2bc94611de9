"""Statistics of z on the training images, stored with the model: the evaluation re-standardises predicted latents.

Legend of shape suffixes: B images, V voxels, C channels, H W height and width of the latent.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nd_dist.models.decoder import Decoder
from nd_dist.schema import INITIAL
from nd_dist.seeds import unit_seed
from nd_dist.training.collective import gather_objects
from nd_dist.world import World

Chunk = tuple[torch.Tensor, torch.Tensor]


class RunningMoments:
    """Sums of values and of squares per element in float64 (latents are of order one, so nothing cancels)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0

    def add(self, values_BCHW: torch.Tensor) -> None:
        """Count the rows of a chunk."""
        wide = values_BCHW.double().cpu()
        self.count += len(wide)
        self.total = self.total + wide.sum(dim=0)
        self.squares = self.squares + wide.square().sum(dim=0)

    def merge(self, other: RunningMoments) -> None:
        """Count what another rank counted."""
        self.count += other.count
        self.total, self.squares = self.total + other.total, self.squares + other.squares

    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and population standard deviation per element, float32 (C, H, W)."""
        mean = torch.as_tensor(self.total) / self.count
        variance = torch.as_tensor(self.squares) / self.count - mean.square()
        return mean.float(), variance.clamp(min=0).sqrt().float()


def z_statistics(decoder: Decoder, subject: int, chunks: Iterable[Chunk], world: World) -> dict[str, torch.Tensor]:
    """Return mean and standard deviation of predicted and of true z over a subject's training images.

    Args:
        decoder: The trained model, evaluated on the device it is on.
        subject: Whose voxels the chunks hold.
        chunks: (voxels (B, V), z (B, C, H, W)), the same on every rank; every rank works on its share of them.
        world: Who this rank is.

    Returns:
        ``prediction_mean``, ``prediction_std``, ``target_mean``, ``target_std``, each (C, H, W) float32.
    """
    predicted, target = RunningMoments(), RunningMoments()
    for i, (voxels_BV, z_BCHW) in enumerate(chunks):
        if i % world.size == world.rank:
            predicted.add(_predict_z(decoder, subject, voxels_BV))
            target.add(z_BCHW)
    pairs = gather_objects((predicted, target))
    predicted, target = RunningMoments(), RunningMoments()
    for rank_predicted, rank_target in pairs:
        predicted.merge(rank_predicted)
        target.merge(rank_target)
    values = {"prediction": predicted.mean_std(), "target": target.mean_std()}
    return {f"{name}_{part}": pair[i] for name, pair in values.items() for i, part in enumerate(("mean", "std"))}


def _predict_z(decoder: Decoder, subject: int, voxels_BV: torch.Tensor) -> torch.Tensor:
    """Return predicted latents; the latent head draws nothing, so the seeds do not matter."""
    return decoder.predict(voxels_BV, subject, [unit_seed(0, "z_statistics")] * len(voxels_BV), only=(INITIAL,))[
        INITIAL
    ]
