"""Random numbers of training, keyed by (seed, step, purpose, sample): the same on any rank, device and batch layout.

Counter-based: element i of a sample's draw is the splitmix64 hash of (key, i), computed in torch's int64 so that it
runs where the data is. Draws of one number a sample are made on the host instead, all of a step in one go, because a
GPU needs longer to be told of a dozen small operations than to do them. No generator state exists, so nothing has to
be saved to resume.

Legend of shape suffixes: B samples, N values of one sample, P purposes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from nd_dist import seeds
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


def host_bits(
    seed: int, step: int, purposes: Sequence[str], sample_id_B: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Return (P, B) random bit patterns, one of every purpose and sample: what ``Draws`` makes of one number each."""
    key_P1 = np.array([unit_seed(seed, "draw", step, purpose) for purpose in purposes], dtype=np.uint64)[:, None]
    return seeds.splitmix64(seeds.splitmix64(seeds.splitmix64(sample_id_B.astype(np.uint64)) + key_P1))


def host_doubles(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return float64 in [0, 1) with 53 of the random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Draws:
    """The random numbers of the samples of one training step.

    Args:
        seed: Seed of the run.
        step: Global micro-step (0-based).
        sample_id_B: (B,) int64 positions of the samples in the global batch; their device is where numbers are made.
        known: Purpose -> uniform numbers (B,) that the host has made already (``Draws.host_uniforms``).
    """

    def __init__(
        self, seed: int, step: int, sample_id_B: torch.Tensor, known: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._seed, self._step, self._sample_id_B, self._known = seed, step, sample_id_B, known or {}

    @staticmethod
    def host_uniforms(
        seed: int, step: int, purposes: Sequence[str], sample_id_B: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """Return (P, B) float32 on the CPU: for each purpose the numbers that ``uniform`` of no shape returns."""
        bits_PB = host_bits(seed, step, purposes, sample_id_B)
        return torch.from_numpy((bits_PB >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))

    def uniform(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return (B, *shape) float32 in [0, 1); ``purpose`` names the draw, equal names give equal numbers."""
        if not shape and purpose in self._known:
            return self._known[purpose]
        return (_shift_right(self._bits(purpose, prod(shape)), 40) * 2.0**-24).view(-1, *shape)

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
