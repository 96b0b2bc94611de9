"""The objective: decoder and losses as one module whose forward is a training step's loss.

Terms of single samples are this rank's part of the mean over the global batch (the average over ranks is that mean);
contrastive terms are computed from the rows of all ranks.

Legend of shape suffixes: B rows of this rank, N rows of the global batch, D flattened width, P positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.compute.device import sent
from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentOutput, TokenHead, TokenOutput
from nd_dist.schema import Batch
from nd_dist.training.objective import losses
from nd_dist.training.objective.mixco import Mix, by_subject, draw_mix, mixed, voxels_of_all
from nd_dist.training.parameters import adamw, parameter_groups
from nd_dist.training.ranks import GlobalRows
from nd_dist.training.schedule import ContrastivePhase, contrastive_phase

LATENT_CONTRASTIVE_WEIGHT = 0.1
TOTAL = "loss"

Distance = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
Teacher = Callable[["StepInputs"], tuple[torch.Tensor, torch.Tensor]]
"""Returns the teacher's rows (B, P, 512) of a batch's images and of their augmented versions."""


@dataclass(frozen=True)
class StepInputs:
    """One batch on the training device.

    Args:
        micro_step: Global micro-step: keys the draws.
        voxels: Subject -> (B_s, V_s).
        targets: Name -> (B, *shape) float32.
        ids_B: (B,) positions in the global batch, on the host.
        pictures: (B, H, W, 3) uint8 where a teacher looks at them.
        known: Purpose -> draws of one number a sample (B,), see ``Draws``.
        mix: How the voxels of token heads are mixed; none: not at all.
    """

    micro_step: int
    voxels: Mapping[int, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    ids_B: npt.NDArray[np.int64]
    pictures: torch.Tensor | None = None
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mix: Mix | None = None

    @staticmethod
    def of(batch: Batch, device: torch.device, dtype: torch.dtype) -> StepInputs:
        """Return the batch on a device: voxels in the network's dtype, targets in float32.

        What is stored in half precision is moved first and widened there: half the bytes, and no work for the CPU.
        """

        def moved(stored: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
            return stored.to(device, non_blocking=True).to(wanted)

        return StepInputs(
            batch.step,
            {subject: moved(voxels_BV, dtype) for subject, voxels_BV in batch.voxels.items()},
            {name: moved(target, torch.float32) for name, target in batch.targets.items()},
            batch.sample_id,
            None if batch.pictures is None else batch.pictures.to(device, non_blocking=True),
        )


class Trainable(nn.Module):
    """A network and its loss as one module, whose forward is what ``Objective.forward`` is: an engine trains it."""

    @property
    def network(self) -> nn.Module:
        """What is trained; the module may hold more."""
        raise NotImplementedError

    def optimizer(self, training: TrainingConfig) -> torch.optim.AdamW:
        """Return fused AdamW over the network's parameters; the engine sets learning rate and betas."""
        return torch.optim.AdamW(self.network.parameters(), weight_decay=training.weight_decay, fused=True)

    def prepare(self, batch: Batch, step: int, device: torch.device, dtype: torch.dtype) -> StepInputs:
        """Return what ``forward`` is given of a batch: all that the host has to do for it."""
        return StepInputs.of(batch, device, dtype)


class _Step(NamedTuple):
    """What all loss terms of one step share; ``terms`` collects what is reported."""

    inputs: StepInputs
    draws: Draws
    phase: ContrastivePhase
    terms: dict[str, torch.Tensor]


class Objective(Trainable):
    """Decoder plus losses.

    Args:
        decoder: The network.
        training: Weights, fractions and quirks.
        total_steps: Optimizer steps of the stage.
        seed: Seed of the run (and stage): keys the draws.
        rows: The global batch of a micro-step: equally many rows of every subject, one subject after the other.
        teacher: Teacher of the latent head's student map; without one that term is off.

    Source: NeuralDiffuser's training losses; released quirks per ``training.quirks``.
    """

    def __init__(
        self,
        decoder: Decoder,
        training: TrainingConfig,
        total_steps: int,
        seed: int,
        rows: GlobalRows,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self._training, self._total_steps, self._seed = training, total_steps, seed
        self._rows, self._teacher = rows, teacher
        num_subjects = len(decoder.num_voxels)
        self._sizes = (rows.num // num_subjects,) * num_subjects
        self._is_released = training.quirks == "official"
        self._has_tokens = any(spec.role != "initial" for spec in decoder.targets)

    @property
    def network(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def optimizer(self, training: TrainingConfig) -> torch.optim.AdamW:
        """Return fused AdamW with the groups of ``parameter_groups``."""
        return adamw(parameter_groups(self.decoder.named_parameters(), training))

    def phase(self, step: int) -> ContrastivePhase:
        """Return the contrastive phase of an optimizer step."""
        return contrastive_phase(step, self._total_steps, self._training.mixco_fraction)

    def prepare(self, batch: Batch, step: int, device: torch.device, dtype: torch.dtype) -> StepInputs:
        """Return the batch with its padding, and every draw that is one number a sample, made on the host at once."""
        plain, pad, ids_B = StepInputs.of(batch, device, dtype), self._rows.pad, self._rows.ids
        purposes, micro_step = self.decoder.draw_purposes, batch.step
        known_PB = sent(Draws.host_uniforms(self._seed, micro_step, purposes, ids_B), device)
        mix = None
        if self._has_tokens and self.phase(step).is_mixco:
            mix = draw_mix(self._seed, micro_step, self._sizes, self._is_released)
            mix = Mix(*(sent(part, device) for part in mix))
        assert list(batch.sample_id) == list(ids_B[: self._rows.num_own]), "the stream deals other rows to this rank"
        voxels, (*_, last) = dict(plain.voxels), batch.voxels
        voxels[last] = pad(voxels[last], len(voxels[last]) + self._rows.per_rank - len(batch))
        return StepInputs(
            micro_step,
            voxels,
            {name: pad(target) for name, target in plain.targets.items()},
            ids_B,
            None if plain.pictures is None else pad(plain.pictures),
            dict(zip(purposes, known_PB, strict=True)),
            mix,
        )

    def forward(self, inputs: StepInputs, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this rank's loss (its average over ranks is the global loss) and its terms, detached.

        Args:
            inputs: The batch.
            step: 0-based optimizer step: sets phase and temperature.
        """
        device = next(iter(inputs.targets.values())).device
        sample_id_B = sent(torch.from_numpy(inputs.ids_B), device)
        draws = Draws(self._seed, inputs.micro_step, sample_id_B, inputs.known)
        voxels, plain_voxels = self._voxels(inputs)
        outputs = self.decoder(voxels, draws, latent_voxels=None if inputs.mix is None else plain_voxels)
        now = _Step(inputs, draws, self.phase(step), {})
        parts: list[torch.Tensor] = []
        for name, output in outputs.items():
            if isinstance(output, LatentOutput):
                parts.append(self._latent_loss(name, output, now))
            else:
                parts.append(self._prior_loss(name, output, now))
                parts.append(self._contrastive_loss(name, output, now))
        loss = torch.stack(parts).sum()
        return loss, {TOTAL: loss.detach(), **{name: term.detach() for name, term in now.terms.items()}}

    def _voxels(self, inputs: StepInputs) -> tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]]:
        """Return what the encoders are given, mixed where the step mixes, and the same unmixed."""
        own, rows, sizes = inputs.voxels, self._rows, self._sizes
        if inputs.mix is None and not self.decoder.encodes_all_rows:
            return own, own
        all_NV = voxels_of_all(own, rows)
        if inputs.mix is None:
            plain = by_subject(all_NV, own, sizes)
            return plain, plain
        mixed_NV = mixed(all_NV, inputs.mix)
        if self.decoder.encodes_all_rows:
            return by_subject(mixed_NV, own, sizes), by_subject(all_NV, own, sizes)
        return by_subject(rows.by_rank(mixed_NV)[rows.world.rank], own, rows.counts(sizes)), own

    def _prior_loss(self, name: str, output: TokenOutput, now: _Step) -> torch.Tensor:
        """Return the weighted mean squared error of the prior (of the backbone, where there is no prior)."""
        head, target_BLD = self.decoder.heads[name], now.inputs.targets[name]
        assert isinstance(head, TokenHead)
        predicted_BLD = head.denoised(output.backbone_BLD, target_BLD, now.draws)
        term = now.terms[f"{name}/prior"] = self._mean(losses.prior_error, predicted_BLD, target_BLD)
        return self._training.prior_weight * term

    def _mean(self, distance: Distance, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a distance's mean over the global batch; padding has no part in it."""
        own = slice(self._rows.num_own)
        return distance(found[own].float(), wanted[own], self._rows.scale(wanted.shape[1:]))

    def _contrastive_loss(self, name: str, output: TokenOutput, now: _Step) -> torch.Tensor:
        """Return the weighted contrastive loss over the global batch; notes how often the nearest row is right."""
        predicted_ND = self._rows(unit_rows(output.contrastive_BLD))
        target_ND = self._rows(unit_rows(now.inputs.targets[name]))
        if now.inputs.mix is not None:
            mixed_NN = losses.mixed_target(now.inputs.mix.weight_N, now.inputs.mix.column_N, self._is_released)
            term = losses.bimixco(predicted_ND, target_ND, mixed_NN, now.phase.temperature)
        else:
            term = losses.soft_clip(predicted_ND, target_ND, now.phase.temperature)
        scores_NN = predicted_ND.detach() @ target_ND.T
        now.terms[f"{name}/contrastive"] = term
        now.terms[f"{name}/top1_image_given_voxels"] = losses.top1(scores_NN)
        now.terms[f"{name}/top1_voxels_given_image"] = losses.top1(scores_NN.T)
        return self._training.contrastive_weight * term

    def _latent_loss(self, name: str, output: LatentOutput, now: _Step) -> torch.Tensor:
        """Return the latent head's loss: L1, and the student's contrastive term where there is a teacher."""
        l1 = self._mean(losses.latent_error, output.latent_BCHW, now.inputs.targets[name])
        now.terms[f"{name}/l1"] = l1
        if self._teacher is None or output.student_BPD is None:
            return l1
        student_NPD, teacher_NPD, augmented_NPD = (
            self._rows(F.normalize(maps_BPD.float(), dim=-1))
            for maps_BPD in (output.student_BPD, *self._teacher(now.inputs))
        )
        num = self._training.latent_negatives
        term = losses.soft_contrastive_in_groups(student_NPD, teacher_NPD, augmented_NPD, num)
        now.terms[f"{name}/contrastive"] = term
        return l1 + LATENT_CONTRASTIVE_WEIGHT * term


def unit_rows(tokens_BLD: torch.Tensor) -> torch.Tensor:
    """Return (B, L*D) float32 rows of unit length."""
    return F.normalize(tokens_BLD.float().flatten(1), dim=-1)
