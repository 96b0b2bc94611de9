"""The diffusion prior: noise schedule, training prediction, and sampling with one explicit seed per sample.

Legend of shape suffixes: B samples, L tokens, D token width, T diffusion times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from nd_dist.config import DecoderConfig
from nd_dist.models.draws import Draws
from nd_dist.models.prior_network import PriorNetwork
from nd_dist.schema import TargetSpec

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


class PriorDraws(NamedTuple):
    """The random choices of one training prediction: times (B,), noise (B, L, D), who keeps condition and target."""

    times_B: torch.Tensor
    noise_BLD: torch.Tensor
    keep_condition_B: torch.Tensor
    keep_target_B: torch.Tensor


class DiffusionPrior(nn.Module):
    """Diffusion from condition tokens (the backbone's output) to target tokens; predicts the clean target.

    Args:
        network: The transformer.
        name: Prefix of the draws' purposes.
        timesteps: Diffusion steps T.
        sample_steps: Steps when sampling; one network call fewer is made.
        drop: Probability to replace condition or target by the learned null embedding in training.

    Source: MindEyeV2's BrainDiffusionPrior over dalle2-pytorch 1.15 (cosine schedule, x0 prediction).
    """

    abar_T: torch.Tensor
    abar_prev_T: torch.Tensor

    def __init__(self, network: PriorNetwork, name: str, timesteps: int, sample_steps: int, drop: float) -> None:
        super().__init__()
        self.network = network
        self._name, self._timesteps, self._sample_steps, self._drop = name, timesteps, sample_steps, drop
        self.purposes = tuple(f"{name}/prior_{what}" for what in ("time", "drop_condition", "drop_target"))
        abar_T = cosine_abar(timesteps)
        self.register_buffer("abar_T", abar_T.float(), persistent=False)
        self.register_buffer("abar_prev_T", torch.cat([abar_T.new_ones(1), abar_T[:-1]]).float(), persistent=False)

    @classmethod
    def from_config(cls, config: DecoderConfig, spec: TargetSpec) -> DiffusionPrior:
        """Return the prior of a token target: width and tokens from the target, ``width // dim_head`` heads."""
        num_tokens, width = spec.shape
        dim_head = min(config.prior_dim_head, width)
        network = PriorNetwork(num_tokens, width, config.prior_depth, max(1, width // dim_head), dim_head)
        return cls(network, spec.name, config.prior_timesteps, config.prior_sample_steps, config.prior_drop)

    def draw(self, draws: Draws, shape: tuple[int, int]) -> PriorDraws:
        """Return the random choices of a training step for targets of ``shape`` (L, D)."""
        time, drop_condition, drop_target = self.purposes
        return PriorDraws(
            (draws.uniform(time) * self._timesteps).long().clamp(max=self._timesteps - 1),
            draws.normal(f"{self._name}/prior_noise", *shape),
            draws.keep(drop_condition, self._drop),
            draws.keep(drop_target, self._drop),
        )

    def add_noise(self, target_BLD: torch.Tensor, times_B: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
        """Return the targets noised to their times, (B, L, D)."""
        abar_B11 = self.abar_T[times_B][:, None, None]
        return abar_B11.sqrt() * target_BLD + (1.0 - abar_B11).sqrt() * noise_BLD

    def forward(self, condition_BLD: torch.Tensor, target_BLD: torch.Tensor, drawn: PriorDraws) -> torch.Tensor:
        """Return the training prediction of the target (B, L, D); the loss is its mean squared error."""
        noisy_BLD = self.add_noise(target_BLD, drawn.times_B, drawn.noise_BLD).to(condition_BLD.dtype)
        predicted_BLD: torch.Tensor = self.network(
            noisy_BLD, drawn.times_B, condition_BLD, drawn.keep_condition_B, drawn.keep_target_B
        )
        return predicted_BLD

    def sampling_times(self) -> list[int]:
        """Return the times of the sampler, most noisy first; the last, -1, is the clean target."""
        points = torch.linspace(-1.0, self._timesteps, steps=self._sample_steps + 1)[:-1]
        return [int(time) for time in points.int().tolist()][::-1]

    def sample(self, condition_BLD: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Return target samples (B, L, D); sample i is drawn with ``seeds[i]`` alone, whatever its batch."""
        shape = (len(self.sampling_times()) - 1, *condition_BLD.shape[1:])
        noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return self.sample_with_noise(condition_BLD, torch.stack(noises, dim=1).to(condition_BLD))

    def sample_with_noise(self, condition_BLD: torch.Tensor, noise_TBLD: torch.Tensor) -> torch.Tensor:
        """Return target samples (B, L, D) from given noise: the start, then one draw for every step but the last.

        DDIM with eta 1. As released, the step mixes the shifted cumulative product (``abar_prev``) with a noise
        estimate from the unshifted one.
        """
        times, x_BLD = self.sampling_times(), noise_TBLD[0]
        for i, (time, next_time) in enumerate(pairwise(times)):
            times_B = torch.full((len(x_BLD),), time, device=x_BLD.device)
            x0_BLD: torch.Tensor = self.network(x_BLD, times_B, condition_BLD)
            if next_time < 0:
                return x0_BLD
            abar, alpha, alpha_next = self.abar_T[time], self.abar_prev_T[time], self.abar_prev_T[next_time]
            noise_BLD = (x_BLD / abar.sqrt() - x0_BLD) / (1.0 / abar - 1.0).sqrt()
            c1 = ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
            c2 = (1 - alpha_next - c1.square()).sqrt()
            x_BLD = (alpha_next.sqrt() * x0_BLD + c1 * noise_TBLD[i + 1] + c2 * noise_BLD).to(condition_BLD.dtype)
        return x_BLD


def cosine_abar(timesteps: int) -> torch.Tensor:
    """Return (T,) float64, the cumulative alphas of the cosine schedule with betas clipped at 0.999.

    Source: Nichol and Dhariwal (2021), equation 17.
    """
    points = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    level = torch.cos((points + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    betas = (1 - level[1:] / level[:-1]).clamp(0, MAX_BETA)
    return torch.cumprod(1 - betas, dim=0)
