"""A plain training loop that works like the released one, for comparison: what it does, not its text.

All betas of all subjects lie in memory; before an epoch every batch of it is made and kept, voxels in dictionaries by
subject and step, targets in one array; the mixer is computed although at one time point none of it reaches the loss;
AdamW and OneCycleLR are as torch makes them. Losses, voxel encoders and heads are this project's own modules, so that
both sides train the same function.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.config import Config
from nd_dist.models.decoder import Decoder
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentOutput, TokenHead
from nd_dist.training.objective import losses
from nd_dist.training.objective.mixco import draw_mix
from nd_dist.training.objective.objectives import unit_rows
from nd_dist.training.schedule import MIXCO_TEMPERATURE
from shards.format.tables import TRAIN
from shards.reading.reader import ShardReader


class ComputedMixer(nn.Module):
    """The published mixer in full, both kinds of blocks, at sequence length 1.

    Args:
        hidden_size: Width.
        num_blocks: Blocks of each kind.
        drop: Dropout probability.
    """

    def __init__(self, hidden_size: int, num_blocks: int, drop: float) -> None:
        super().__init__()
        self.hidden_blocks = nn.ModuleList(_block(hidden_size, drop) for _ in range(num_blocks))
        self.token_blocks = nn.ModuleList(_block(1, drop) for _ in range(num_blocks))

    def forward(self, x_BSH: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return the mixed (B, S, H); ``draws`` is not used, dropout takes torch's generator."""
        residual_1, residual_2 = x_BSH, x_BSH.transpose(1, 2)
        for hidden, token in zip(self.hidden_blocks, self.token_blocks, strict=True):
            x_BSH = residual_1 = hidden(x_BSH) + residual_1
            residual_2 = token(x_BSH.transpose(1, 2)) + residual_2
            x_BSH = residual_2.transpose(1, 2)
        return x_BSH


def _block(width: int, drop: float) -> nn.Sequential:
    """Return LayerNorm, Linear, GELU, dropout, Linear."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(drop), nn.Linear(width, width)
    )


@dataclass(frozen=True)
class LoopResult:
    """What a run of the plain loop took.

    Args:
        epoch_s, epoch_cpu_s: Seconds to make an epoch's batches, by the clock and of the processor.
        step_s, step_cpu_s: Seconds of each step.
    """

    epoch_s: float
    epoch_cpu_s: float
    step_s: list[float]
    step_cpu_s: list[float]


class ReleasedLoop:
    """Stage 1 of a recipe with one target.

    Args:
        config: The recipe.
        device: Where to train.
        computes_mixer: Whether the mixer is computed, as released.
        is_fused: Whether AdamW is torch's fused one (it is not, as released).
        num_trials: Trials of a subject whose betas lie in memory; the made-up ones are repeated up to that.
    """

    def __init__(
        self, config: Config, device: torch.device, computes_mixer: bool, is_fused: bool, num_trials: int
    ) -> None:
        torch.manual_seed(config.seed)
        self._config, self._device = config, device
        self._reader = ShardReader(config.shards_dir)
        self._subjects = sorted(set(config.data.subjects) - {config.training.target_subject})
        voxels = {subject: self._reader.num_voxels[subject] for subject in self._subjects}
        (self._target,) = self._reader.index.target_specs
        self._decoder = Decoder(config.decoder, voxels, [self._target])
        head = self._decoder.heads[self._target.name]
        if computes_mixer and isinstance(head, TokenHead):
            decoder = config.decoder
            head.backbone.mixer = ComputedMixer(decoder.hidden_size, decoder.num_blocks, decoder.backbone_dropout)
        self._decoder.to(device)
        parameters = list(self._decoder.parameters())
        self._optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate, fused=is_fused or None)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, config.training.learning_rate, total_steps=config.training.steps[0]
        )
        self._scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
        self._betas = {subject: self._all_betas(subject, num_trials) for subject in self._subjects}

    def _all_betas(self, subject: int, num_trials: int) -> tuple[torch.Tensor, np.ndarray]:
        """Return all training betas of a subject (T, V), half precision as released, and their images (T,)."""
        trials = self._reader.trials
        rows = trials[(trials["subject"] == subject) & (trials["split"] == TRAIN)]
        stored = np.empty((len(rows), self._reader.num_voxels[subject]), dtype=self._reader.index.voxels.dtype)
        self._reader.read_voxels(rows, stored)
        place = np.arange(num_trials) % len(rows)
        return torch.from_numpy(stored).half()[place], np.asarray(rows["image"])[place]

    def run(self, epoch_steps: int, timed_steps: int) -> LoopResult:
        """Make an epoch's batches, then take the first steps of it."""
        watch = [(time.perf_counter(), time.process_time())]
        voxels, _, targets = self._make_epoch(epoch_steps)
        watch.append((time.perf_counter(), time.process_time()))
        for step in range(timed_steps):
            batch = {s: voxels[f"subj{s:02d}_iter{step}"].float().to(self._device) for s in self._subjects}
            self._step(step, batch, targets[step].to(self._device))
            watch.append((time.perf_counter(), time.process_time()))
        seconds, cpu_seconds = ([b[i] - a[i] for a, b in pairwise(watch)] for i in (0, 1))
        return LoopResult(seconds[0], cpu_seconds[0], seconds[1:], cpu_seconds[1:])

    def _make_epoch(self, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], torch.Tensor]:
        """Return voxels and images by subject and step, and all targets (steps, B, *shape) float32."""
        quota, rng = self._config.training.samples_per_subject[0], np.random.default_rng(0)
        voxels: dict[str, torch.Tensor] = {}
        images: dict[str, np.ndarray] = {}
        targets = torch.zeros(steps, quota * len(self._subjects), *self._target.shape)
        for place, subject in enumerate(self._subjects):
            betas, image_of = self._betas[subject]
            for step in range(steps):
                rows = rng.integers(0, len(image_of), quota)
                voxels[f"subj{subject:02d}_iter{step}"] = betas[rows]
                images[f"subj{subject:02d}_iter{step}"] = image_of[rows]
                found = self._reader.targets(self._target.name, image_of[rows].tolist())
                targets[step, place * quota : (place + 1) * quota] = torch.from_numpy(found)
        return voxels, images, targets

    def _step(self, step: int, voxels: dict[int, torch.Tensor], target: torch.Tensor) -> float:
        """Make one optimizer step and return the loss."""
        self._optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=self._device.type == "cuda"):  # as released
            loss = torch.stack(list(self._losses(step, voxels, target))).sum()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        return float(loss.detach())

    def _losses(self, step: int, voxels: dict[int, torch.Tensor], target: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the loss terms of a batch in its MixCo phase."""
        rows = torch.arange(len(target), device=self._device)
        draws = Draws(self._config.seed, step, rows)
        mix = draw_mix(self._config.seed, step, [len(own) for own in voxels.values()], is_released=False)
        weight_N, partner_N, mixed, start = mix.weight_N.to(self._device), mix.partner_N.to(self._device), {}, 0
        for subject, own in voxels.items():
            share, partner = weight_N[start : start + len(own), None], partner_N[start : start + len(own)] - start
            mixed[subject] = share * own + (1 - share) * own[partner]
            start += len(own)
        output = self._decoder(mixed, draws, latent_voxels=voxels)[self._target.name]
        if isinstance(output, LatentOutput):
            yield losses.latent_error(output.latent_BCHW, target, 1 / target.numel())
            return
        head = self._decoder.heads[self._target.name]
        assert isinstance(head, TokenHead)
        predicted = output.backbone_BLD
        if head.prior is not None:
            predicted = head.prior(predicted, target, head.prior.draw(draws, (target.shape[1], target.shape[2])))
        yield self._config.training.prior_weight * F.mse_loss(predicted, target)
        wanted = losses.mixed_target(weight_N, partner_N, False)
        yield losses.bimixco(unit_rows(output.contrastive_BLD), unit_rows(target), wanted, MIXCO_TEMPERATURE)
