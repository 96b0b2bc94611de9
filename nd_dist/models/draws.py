"""Random numbers of training, keyed by (seed, step, purpose, sample): the same on any rank, device and batch layout.

Counter-based: element i of a sample's draw is the splitmix64 hash of (key, i), computed in torch's int64 so that it
runs where the data is. No generator state exists, so nothing has to be saved to resume.

Legend of shape suffixes: B samples, N values of one sample.
"""

from __future__ import annotations

import math
from math import prod

import torch

from nd_dist.seeds import unit_seed


def _signed(value: int) -> int:
    """Return a 64-bit pattern as the int64 that holds it (torch has no uint64 arithmetic)."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the logical right shift of int64 bit patterns."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """Return the splitmix64 hash of int64 bit patterns; equals ``nd_dist.seeds.splitmix64`` on the same bits."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MIX_2
    return mixed ^ _shift_right(mixed, 31)


class Draws:
    """The random numbers of the samples of one training step.

    Args:
        seed: Seed of the run.
        step: Global micro-step (0-based).
        sample_id_B: (B,) int64 positions of the samples in the global batch; their device is where numbers are made.
    """

    def __init__(self, seed: int, step: int, sample_id_B: torch.Tensor) -> None:
        self._seed, self._step, self._sample_id_B = seed, step, sample_id_B

    def for_samples(self, sample_id_B: torch.Tensor) -> Draws:
        """Return the same step's draws for other samples (a subset, or the whole global batch)."""
        return Draws(self._seed, self._step, sample_id_B)

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return (B, *shape) float32 in [0, 1); ``purpose`` names the draw, equal names give equal numbers."""
        return (_shift_right(self._bits(purpose, prod(shape)), 40) * 2.0**-24).view(-1, *shape)

    def uniform_double(self, purpose: str) -> torch.Tensor:
        """Return (B,) float64 in [0, 1) with 53 random bits, one value per sample."""
        return _shift_right(self._bits(purpose, 1), 11)[:, 0].double() * 2.0**-53

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return (B, *shape) float32 standard normal numbers (Box-Muller on the halves of one hash)."""
        count = prod(shape)
        bits_BN = self._bits(purpose, (count + 1) // 2)
        radius_BN = torch.sqrt(-2.0 * torch.log((_shift_right(bits_BN, 40) + 1) * 2.0**-24))
        angle_BN = (bits_BN & 0xFFFFFF) * (2.0 * math.pi * 2.0**-24)
        values_BN = torch.cat([radius_BN * torch.cos(angle_BN), radius_BN * torch.sin(angle_BN)], dim=1)
        return values_BN[:, :count].reshape(-1, *shape)

    def keep(self, purpose: str, drop: float, *shape: int) -> torch.Tensor:
        """Return a (B, *shape) boolean mask that is false with probability ``drop``."""
        return self.uniform(purpose, *shape) >= drop

    def _bits(self, purpose: str, count: int) -> torch.Tensor:
        """Return (B, count) int64 random bit patterns."""
        key = unit_seed(self._seed, "draw", self._step, purpose)
        base_B1 = splitmix64(splitmix64(self._sample_id_B) + key)[:, None]
        counter_N = torch.arange(count, dtype=torch.int64, device=base_B1.device) * _GOLDEN
        return splitmix64(base_B1 + counter_N)


def dropout(values: torch.Tensor, drop: float, draws: Draws | None, purpose: str) -> torch.Tensor:
    """Return ``values`` (B, ...), zeroed at probability ``drop`` each and scaled by 1/(1-drop) elsewhere.

    Without draws, in evaluation, they are unchanged.
    """
    if draws is None or drop == 0.0:
        return values
    if drop == 1.0:
        return values * 0.0
    return values * draws.keep(purpose, drop, *values.shape[1:]).to(values.dtype) / (1.0 - drop)
