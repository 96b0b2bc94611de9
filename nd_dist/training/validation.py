"""Validation as published: the first images, outputs averaged over three repeats, retrieval in both directions.

Which images: training images that were held out, where the recipe holds some out, else test images, as published.

Legend of shape suffixes: N images of all ranks, B images of this rank, R repeats, V voxels, L tokens, D width or
flattened width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch.nn import functional as F

from nd_dist.config import TrainingConfig
from nd_dist.metrics.kind import Classes, Probe, each_picture, fit_probe, labels_of, probe_images
from nd_dist.models.decoder import Decoder, HeadOutput
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentOutput, TokenHead
from nd_dist.schema import SEMANTIC
from nd_dist.training.objective import losses
from nd_dist.training.objective.objectives import TOTAL, unit_rows
from nd_dist.training.ranks import Gather, GlobalRows
from nd_dist.training.source import TrainingSource
from nd_dist.world import World

CHUNK_IMAGES = 25
TEMPERATURE = 0.006
REPEATS = 3


class Validation:
    """Looks at a decoder on a subject's validation images. Every rank calls it alike and computes its share of them.

    Args:
        source: Gives voxels and targets of the images.
        subject: Whose: as published, the target subject, or the first one where several are trained.
        training: Weights of the loss, number of images, targets.
        world: Who this rank is.
        gather: How rows of all ranks are collected.
        classes: What is in images, training images too; empty where nothing is known.

    Source: NeuralDiffuser's training scripts; the drops of the prior's condition, left on there, are off.
    """

    def __init__(
        self,
        source: TrainingSource,
        subject: int,
        training: TrainingConfig,
        world: World,
        gather: Gather,
        classes: Classes,
    ) -> None:
        self._source, self._subject, self._training = source, subject, training
        self._world, self._gather = world, gather
        self.split, image_ids = source.validation_images(subject)
        self.image_ids = image_ids[: training.validation_images]
        self._classes = classes if SEMANTIC in training.targets and probe_images(classes, self.image_ids) else {}

    @cached_property
    def _probe(self) -> Probe:
        """What reads classes from c, learnt from true c of the subject's training images."""
        ids = probe_images(self._classes, self._source.fit_images(self._subject, None))
        return fit_probe(self._source.image_targets(SEMANTIC, ids), labels_of(self._classes, ids))

    @torch.no_grad()
    def __call__(self, decoder: Decoder) -> dict[str, float]:
        """Return named numbers, equal on every rank: ``loss``, and per target its terms and top-1 among N images."""
        found: dict[str, list[torch.Tensor]] = {}
        step = CHUNK_IMAGES * self._world.size
        for start in range(0, len(self.image_ids), step):
            for term, values_N in self._rows(decoder, self.image_ids[start : start + step]).items():
                found.setdefault(term, []).append(values_N)
        return self._numbers({term: torch.cat(parts) for term, parts in found.items()})

    def _rows(self, decoder: Decoder, image_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what every head says of some images, one row per image."""
        rows, weight = GlobalRows(len(image_ids), self._world, self._gather), next(decoder.parameters())
        own = [image_ids[min(place, rows.num - 1)] for place in rows.ids.tolist()]  # padding sees the last one again
        voxels_BRV, targets = self._source.validation_trials(self._subject, own, self._training.targets)
        voxels_BRV = voxels_BRV.to(device=weight.device, dtype=weight.dtype)
        outputs = []
        for voxels_BV in voxels_BRV.unbind(dim=1):
            outputs.append(decoder({self._subject: rows(voxels_BV) if decoder.encodes_all_rows else voxels_BV}))
        found: dict[str, torch.Tensor] = {}
        for name in self._training.targets:
            target = targets[name].to(device=weight.device, dtype=torch.float32)
            for term, values_B in _head_rows(decoder, name, [output[name] for output in outputs], target, own).items():
                found[f"{name}/{term}"] = rows(values_B)
            if self._reads_kind(decoder, name):
                found[f"{name}/backbone"] = rows(_backbone([output[name] for output in outputs]).flatten(1))
        return found

    def _reads_kind(self, decoder: Decoder, name: str) -> bool:
        """Return whether a head's tokens are the prediction of c itself, and classes are known."""
        head = decoder.heads[name]
        return bool(self._classes) and name == SEMANTIC and isinstance(head, TokenHead) and head.prior is None

    def _numbers(self, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the means and retrieval of all images."""
        found: dict[str, float] = {}
        total = 0.0
        for name in self._training.targets:
            if f"{name}/l1" in rows:
                found[f"{name}/l1"] = float(rows[f"{name}/l1"].mean())
                total += found[f"{name}/l1"]
                continue
            predicted_ND, target_ND = rows[f"{name}/predicted"], rows[f"{name}/target"]
            scores_NN = predicted_ND @ target_ND.T
            prior = found[f"{name}/prior"] = float(rows[f"{name}/prior"].mean())
            if f"{name}/backbone" in rows:
                scores_NK = self._probe.scores(rows[f"{name}/backbone"].cpu().numpy())
                each_N = each_picture(scores_NK, labels_of(self._classes, self.image_ids))
                found[f"{name}/kind"] = float(each_N.mean())
            contrastive = float(losses.soft_clip(predicted_ND, target_ND, TEMPERATURE))
            found[f"{name}/contrastive"] = contrastive
            found[f"{name}/top1_image_given_voxels"] = float(losses.top1(scores_NN))
            found[f"{name}/top1_voxels_given_image"] = float(losses.top1(scores_NN.T))
            total += self._training.prior_weight * prior + self._training.contrastive_weight * contrastive
        return {TOTAL: total, **found}


def _head_rows(
    decoder: Decoder, name: str, outputs: Sequence[HeadOutput], target: torch.Tensor, image_ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return what one head says of images, one row each, given its outputs for every repeat."""
    first = outputs[0]
    if isinstance(first, LatentOutput):
        latent_BCHW = _mean(outputs, lambda output: output.latent_BCHW)
        return {"l1": (latent_BCHW - target).abs().flatten(1).mean(dim=1) / losses.LATENT_SCALE}
    head = decoder.heads[name]
    assert isinstance(head, TokenHead)
    backbone_BLD = _backbone(outputs).to(first.backbone_BLD.dtype)
    draws = Draws(0, 0, torch.tensor(image_ids, device=target.device))  # an image's own time and noise, every time
    predicted_BLD = head.denoised(backbone_BLD, target, draws, has_drops=False)
    return {
        "prior": F.mse_loss(predicted_BLD.float(), target, reduction="none").flatten(1).mean(dim=1),
        "predicted": unit_rows(_mean(outputs, lambda output: output.contrastive_BLD)),
        "target": unit_rows(target),
    }


def _backbone(outputs: Sequence[HeadOutput]) -> torch.Tensor:
    """Return the backbone's tokens (B, L, D), mean over repeats."""
    return _mean(outputs, lambda output: output.backbone_BLD)


def _mean(outputs: Sequence[HeadOutput], part: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the mean over repeats of a part of a head's output, in float32."""
    return torch.stack([part(output).float() for output in outputs]).mean(dim=0)
