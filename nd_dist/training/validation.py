"""Validation as published: the first test images, outputs averaged over three repeats, retrieval in both directions.

Every rank takes its share of the images; rows of all ranks meet only as unit vectors and as scores. A share is padded
to equal length (ranks must call the model equally often), and what it was padded with is left out of every number.

Legend of shape suffixes: N images, B images of a chunk or of this rank, R repeats, V voxels, L tokens, D width or
flattened width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import Decoder, HeadOutput
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentOutput, TokenHead
from nd_dist.training.objective import losses
from nd_dist.training.objective.objectives import TOTAL, unit_rows
from nd_dist.training.ranks import Gather, GlobalRows
from nd_dist.training.source import TrainingSource
from nd_dist.world import World

CHUNK_IMAGES = 25
TEMPERATURE = 0.006
REPEATS = 3


@dataclass(frozen=True)
class Share:
    """This rank's part of the validation images.

    Args:
        image_ids: Ids of the images, padded with the first one.
        positions: Their positions among all; those of the padding lie behind the last image's.
        num_images: N.
    """

    image_ids: tuple[int, ...]
    positions: tuple[int, ...]
    num_images: int

    @staticmethod
    def of(image_ids: Sequence[int], world: World) -> Share:
        """Return every ``world.size``-th image from the rank's on."""
        padded = -(-len(image_ids) // world.size) * world.size
        positions = tuple(range(world.rank, padded, world.size))
        ids = tuple(image_ids[p] if p < len(image_ids) else image_ids[0] for p in positions)
        return Share(ids, positions, len(image_ids))

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yield the ids in chunks."""
        return (self.image_ids[i : i + CHUNK_IMAGES] for i in range(0, len(self.image_ids), CHUNK_IMAGES))


class Validation:
    """Looks at a decoder on a subject's test images. Every rank calls it alike.

    Args:
        source: Gives voxels and targets of the test images.
        subject: Whose: as published, the target subject, or the first one where several are trained.
        training: Weights of the loss, number of images, targets.
        world: Who this rank is.
        gather: How rows of all ranks are collected.

    Source: NeuralDiffuser's training scripts; the drops of the prior's condition, left on there, are off.
    """

    def __init__(
        self, source: TrainingSource, subject: int, training: TrainingConfig, world: World, gather: Gather
    ) -> None:
        self._source, self._subject, self._training, self._gather = source, subject, training, gather
        image_ids = source.test_images(subject)[: training.validation_images]
        self.num_images = len(image_ids)
        self._share = Share.of(image_ids, world)

    @torch.no_grad()
    def __call__(self, decoder: Decoder) -> dict[str, float]:
        """Return named numbers, equal on every rank: ``loss``, and per target its terms and top-1 among N images."""
        weight = next(decoder.parameters())
        rows: dict[str, list[torch.Tensor]] = {}
        for image_ids in self._share.chunks():
            voxels_BRV, targets = self._source.test_trials(self._subject, image_ids, self._training.targets)
            flat = voxels_BRV.flatten(0, 1).to(device=weight.device, dtype=weight.dtype)
            for name, output in decoder({self._subject: flat}).items():
                target = targets[name].to(device=weight.device, dtype=torch.float32)
                for term, values in _chunk_rows(decoder, name, output, target, image_ids).items():
                    rows.setdefault(term, []).append(values)
        return self._numbers({term: torch.cat(parts) for term, parts in rows.items()}, weight.device)

    def _numbers(self, rows: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
        """Return the means and retrieval of the rows of all ranks."""
        of_all = GlobalRows(self._gather, torch.tensor(self._share.positions, device=device))

        def in_order(rows_B: torch.Tensor) -> torch.Tensor:
            return of_all(rows_B)[: self.num_images]  # what follows them is padding

        found: dict[str, float] = {}
        total = 0.0
        for name in self._training.targets:
            if f"{name}/l1" in rows:
                l1 = found[f"{name}/l1"] = float(in_order(rows[f"{name}/l1"]).mean())
                total += l1
                continue
            prior = found[f"{name}/prior"] = float(in_order(rows[f"{name}/prior"]).mean())
            predicted_BD, target_BD = rows[f"{name}/predicted"], rows[f"{name}/target"]
            targets_ND = in_order(target_BD)  # a rank scores its own rows against the targets of all
            scores_NN, likeness_NN = in_order(predicted_BD @ targets_ND.T), in_order(target_BD @ targets_ND.T)
            contrastive = float(losses.soft_clip_of(scores_NN / TEMPERATURE, likeness_NN / TEMPERATURE))
            found[f"{name}/contrastive"] = contrastive
            found[f"{name}/top1_image_given_voxels"] = float(losses.top1(scores_NN))
            found[f"{name}/top1_voxels_given_image"] = float(losses.top1(scores_NN.T))
            total += self._training.prior_weight * prior + self._training.contrastive_weight * contrastive
        return {TOTAL: total, **found}


def _chunk_rows(
    decoder: Decoder, name: str, output: HeadOutput, target: torch.Tensor, image_ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return what one head says of a chunk, one row per image."""
    if isinstance(output, LatentOutput):
        latent_BCHW = _over_repeats(output.latent_BCHW)
        return {f"{name}/l1": (latent_BCHW - target).abs().flatten(1).mean(dim=1) / losses.LATENT_SCALE}
    head = decoder.heads[name]
    assert isinstance(head, TokenHead)
    backbone_BLD = _over_repeats(output.backbone_BLD).to(output.backbone_BLD.dtype)
    draws = Draws(0, 0, torch.tensor(image_ids, device=target.device))  # an image's own time and noise, every time
    predicted_BLD = head.denoised(backbone_BLD, target, draws, has_drops=False)
    return {
        f"{name}/prior": F.mse_loss(predicted_BLD.float(), target, reduction="none").flatten(1).mean(dim=1),
        f"{name}/predicted": unit_rows(_over_repeats(output.contrastive_BLD)),
        f"{name}/target": unit_rows(target),
    }


def _over_repeats(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over repeats (B, ...) in float32, given (B R, ...)."""
    return values.float().view(-1, REPEATS, *values.shape[1:]).mean(dim=1)
