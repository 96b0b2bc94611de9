"""The objective: decoder and losses as one module whose forward is a training step's loss.

Per-sample terms are means over this rank's rows (ranks hold equally many, so the average over ranks is the global
mean); contrastive terms are computed from the rows of all ranks.

Legend of shape suffixes: B rows of this rank, N rows of the global batch, D flattened width, P positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentOutput, TokenHead, TokenOutput
from nd_dist.schema import Batch
from nd_dist.training.objective import losses
from nd_dist.training.objective.mixco import Mix, mix_voxels
from nd_dist.training.parameters import adamw, decay_groups
from nd_dist.training.ranks import Gather, GlobalRows, identity
from nd_dist.training.schedule import ContrastivePhase, contrastive_phase

LATENT_CONTRASTIVE_WEIGHT = 0.1
TOTAL = "loss"

Teacher = Callable[["StepInputs"], tuple[torch.Tensor, torch.Tensor]]
"""Returns the teacher's rows (B, P, 512) of a batch's images and of their augmented versions."""


@dataclass(frozen=True)
class StepInputs:
    """One batch on the training device.

    Args:
        micro_step: Global micro-step: keys the draws.
        voxels: Subject -> (B_s, V_s).
        targets: Name -> (B, *shape) float32.
        sample_id_B: (B,) int64 positions in the global batch.
        pictures: (B, H, W, 3) uint8 where a teacher looks at them.
    """

    micro_step: int
    voxels: Mapping[int, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    sample_id_B: torch.Tensor
    pictures: torch.Tensor | None = None

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
            torch.as_tensor(batch.sample_id, dtype=torch.int64).to(device),
            None if batch.pictures is None else batch.pictures.to(device, non_blocking=True),
        )


class _Step(NamedTuple):
    """What all loss terms of one step share; ``terms`` collects what is reported."""

    inputs: StepInputs
    draws: Draws
    rows: GlobalRows
    phase: ContrastivePhase
    mix: Mix | None
    terms: dict[str, torch.Tensor]


class Trainable(nn.Module):
    """A network and its loss as one module, whose forward is what ``Objective.forward`` is: an engine trains it."""

    @property
    def network(self) -> nn.Module:
        """What is trained; the module may hold more."""
        raise NotImplementedError

    def optimizer(self, training: TrainingConfig) -> torch.optim.AdamW:
        """Return AdamW over the network's parameters; the engine sets learning rate and betas."""
        return torch.optim.AdamW(self.network.parameters(), weight_decay=training.weight_decay)


class Objective(Trainable):
    """Decoder plus losses.

    Args:
        decoder: The network.
        training: Weights, fractions and quirks.
        total_steps: Optimizer steps of the stage.
        seed: Seed of the run (and stage): keys the draws.
        gather: How rows of all ranks are collected; identity in a world of one.
        teacher: Teacher of the latent head's student map; without one that term is off.

    Source: NeuralDiffuser's training losses; released quirks per ``training.quirks``.
    """

    def __init__(
        self,
        decoder: Decoder,
        training: TrainingConfig,
        total_steps: int,
        seed: int,
        gather: Gather = identity,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self._training, self._total_steps, self._seed = training, total_steps, seed
        self._gather, self._teacher = gather, teacher
        self._is_released = training.quirks == "official"
        self._has_tokens = any(spec.role != "initial" for spec in decoder.targets)

    @property
    def network(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def optimizer(self, training: TrainingConfig) -> torch.optim.AdamW:
        """Return fused AdamW with the groups of ``decay_groups``."""
        return adamw(decay_groups(self.decoder.named_parameters(), training))

    def forward(self, inputs: StepInputs, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this rank's loss (its average over ranks is the global loss) and its terms, detached.

        Args:
            inputs: The batch.
            step: 0-based optimizer step: sets phase and temperature.
        """
        phase = contrastive_phase(step, self._total_steps, self._training.mixco_fraction)
        draws = Draws(self._seed, inputs.micro_step, inputs.sample_id_B)
        if phase.is_mixco and self._has_tokens:
            mix = mix_voxels(inputs.voxels, draws, inputs.sample_id_B, self._gather, self._is_released)
            outputs = self.decoder(mix.voxels, draws, latent_voxels=inputs.voxels)
        else:
            mix, outputs = None, self.decoder(inputs.voxels, draws)
        now = _Step(inputs, draws, GlobalRows(self._gather, inputs.sample_id_B), phase, mix, {})
        parts: list[torch.Tensor] = []
        for name, output in outputs.items():
            if isinstance(output, LatentOutput):
                parts.append(self._latent_loss(name, output, now))
            else:
                parts.append(self._prior_loss(name, output, now))
                parts.append(self._contrastive_loss(name, output, now))
        loss = torch.stack(parts).sum()
        return loss, {TOTAL: loss.detach(), **{name: term.detach() for name, term in now.terms.items()}}

    def _prior_loss(self, name: str, output: TokenOutput, now: _Step) -> torch.Tensor:
        """Return the weighted mean squared error of the prior (of the backbone, where there is no prior)."""
        head, target_BLD = self.decoder.heads[name], now.inputs.targets[name]
        assert isinstance(head, TokenHead)
        predicted_BLD = head.denoised(output.backbone_BLD, target_BLD, now.draws)
        term = now.terms[f"{name}/prior"] = F.mse_loss(predicted_BLD.float(), target_BLD)
        return self._training.prior_weight * term

    def _contrastive_loss(self, name: str, output: TokenOutput, now: _Step) -> torch.Tensor:
        """Return the weighted contrastive loss over the global batch; notes how often the nearest row is right."""
        predicted_ND = now.rows(unit_rows(output.contrastive_BLD))
        target_ND = now.rows(unit_rows(now.inputs.targets[name]))
        if now.mix is not None:
            mixed_NN = losses.mixed_target(now.mix.weight_N, now.mix.column_N, self._is_released)
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
        l1 = now.terms[f"{name}/l1"] = losses.latent_l1(output.latent_BCHW.float(), now.inputs.targets[name])
        if self._teacher is None or output.student_BPD is None:
            return l1
        student_ND, teacher_ND, augmented_ND = (
            now.rows(F.normalize(maps_BPD.float(), dim=-1)).flatten(0, 1)
            for maps_BPD in (output.student_BPD, *self._teacher(now.inputs))
        )
        term = losses.soft_contrastive(student_ND, teacher_ND, augmented_ND, losses.STUDENT_TEMPERATURE)
        now.terms[f"{name}/contrastive"] = term
        return l1 + LATENT_CONTRASTIVE_WEIGHT * term


def unit_rows(tokens_BLD: torch.Tensor) -> torch.Tensor:
    """Return (B, L*D) float32 rows of unit length."""
    return F.normalize(tokens_BLD.float().flatten(1), dim=-1)
