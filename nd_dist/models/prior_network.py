"""The transformer of the diffusion prior: [condition | time | noisy target] tokens in, clean target tokens out.

It knows nothing of schedules or losses (see ``prior``).

Legend of shape suffixes: B samples, L tokens, D token width, N = 2 L + 1 positions, A heads, E width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

NUM_BUCKETS = 32
MAX_DISTANCE = 128
ROTARY_DIM = 32
ATTENTION_SCALE = 16.0
TIME_PERIOD = 10_000.0
FEEDFORWARD_FACTOR = 4


class ScaleNorm(nn.Module):
    """LayerNorm with a scale and no bias; the stable form first divides by the maximum (no gradient through it).

    Args:
        width: Token width D.
        is_stable: Whether to divide first.

    Source: dalle2-pytorch's LayerNorm; eps 1e-5 in float32, 1e-3 in half precisions.
    """

    def __init__(self, width: int, is_stable: bool = False) -> None:
        super().__init__()
        self._is_stable = is_stable
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape."""
        eps = 1e-5 if x_BND.dtype in (torch.float32, torch.float64) else 1e-3
        if self._is_stable:
            x_BND = x_BND / x_BND.amax(dim=-1, keepdim=True).detach()
        variance = torch.var(x_BND, dim=-1, correction=0, keepdim=True)
        mean = torch.mean(x_BND, dim=-1, keepdim=True)
        return (x_BND - mean) * (variance + eps).rsqrt() * self.scale


class PriorAttention(nn.Module):
    """Cosine attention with one key and value shared by all heads, rotary positions and a learned null key.

    Args:
        width: Token width D.
        num_heads: Heads A.
        dim_head: Width E of a head.
    """

    def __init__(self, width: int, num_heads: int, dim_head: int) -> None:
        super().__init__()
        self._num_heads, self._dim_head = num_heads, dim_head
        self.norm = ScaleNorm(width)
        self.to_q = nn.Linear(width, num_heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * dim_head, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_out = nn.Linear(num_heads * dim_head, width, bias=False)
        self.out_norm = ScaleNorm(width)

    def forward(self, x_BND: torch.Tensor, rotary_2NR: torch.Tensor, bias_ANM: torch.Tensor) -> torch.Tensor:
        """Return (B, N, D), the residual update; M = N + 1 keys, the null key first."""
        y_BND = self.norm(x_BND)
        q_BANE = self.to_q(y_BND).unflatten(-1, (self._num_heads, self._dim_head)).transpose(1, 2)
        k_BNE, v_BNE = self.to_kv(y_BND).chunk(2, dim=-1)
        q_BANE, k_BNE = rotate(q_BANE, rotary_2NR), rotate(k_BNE, rotary_2NR)
        null_2B1E = self.null_kv[:, None, None, :].expand(-1, len(x_BND), 1, -1)
        k_BME = torch.cat([null_2B1E[0], k_BNE], dim=1)
        v_BME = torch.cat([null_2B1E[1], v_BNE], dim=1)
        q_BANE, k_BME = F.normalize(q_BANE, dim=-1), F.normalize(k_BME, dim=-1)
        logits_BANM = ATTENTION_SCALE * torch.einsum("bane,bme->banm", q_BANE, k_BME) + bias_ANM
        weights_BANM = logits_BANM.float().softmax(dim=-1).to(logits_BANM.dtype)
        mixed_BND = torch.einsum("banm,bme->bnae", weights_BANM, v_BME).flatten(2)
        update_BND: torch.Tensor = self.out_norm(self.to_out(mixed_BND))
        return update_BND


class PriorFeedForward(nn.Module):
    """Norm, gated SiLU, linear; four times the width inside.

    Args:
        width: Token width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ScaleNorm(width)
        self.linear_in = nn.Linear(width, 2 * FEEDFORWARD_FACTOR * width, bias=False)
        self.linear_out = nn.Linear(FEEDFORWARD_FACTOR * width, width, bias=False)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Return (B, N, D), the residual update."""
        values, gate = self.linear_in(self.norm(x_BND)).chunk(2, dim=-1)
        update_BND: torch.Tensor = self.linear_out(values * F.silu(gate))
        return update_BND


class PriorLayer(nn.Module):
    """Attention and feed-forward, each added to its input.

    Args:
        width: Token width D.
        num_heads: Heads A.
        dim_head: Width E of a head.
    """

    def __init__(self, width: int, num_heads: int, dim_head: int) -> None:
        super().__init__()
        self.attention = PriorAttention(width, num_heads, dim_head)
        self.feedforward = PriorFeedForward(width)

    def forward(self, x_BND: torch.Tensor, rotary_2NR: torch.Tensor, bias_ANM: torch.Tensor) -> torch.Tensor:
        """Return (B, N, D)."""
        x_BND = x_BND + self.attention(x_BND, rotary_2NR, bias_ANM)
        update_BND: torch.Tensor = self.feedforward(x_BND)
        return x_BND + update_BND


class PriorNetwork(nn.Module):
    """Predicts the clean target tokens from a noisy target, its time and the condition tokens.

    Args:
        num_tokens: Tokens L of target and condition.
        width: Token width D (even).
        depth: Layers.
        num_heads: Heads A.
        dim_head: Width E of a head.

    Source: dalle2-pytorch 1.15's causal transformer as MindEyeV2's PriorNetwork uses it (not causal).
    """

    rotary_2NR: torch.Tensor
    buckets_NM: torch.Tensor

    def __init__(self, num_tokens: int, width: int, depth: int, num_heads: int, dim_head: int) -> None:
        super().__init__()
        self._num_tokens, self._width = num_tokens, width
        self.learned_query = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.null_brain = nn.Parameter(torch.randn(num_tokens, width))
        self.null_image = nn.Parameter(torch.randn(num_tokens, width))
        self.time = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        self.relative_attention_bias = nn.Embedding(NUM_BUCKETS, num_heads)
        self.layers = nn.ModuleList(PriorLayer(width, num_heads, dim_head) for _ in range(depth))
        self.norm = ScaleNorm(width, is_stable=True)
        self.project_out = nn.Linear(width, width, bias=False)
        positions = 2 * num_tokens + 1
        self.register_buffer("rotary_2NR", rotary_table(positions, min(ROTARY_DIM, dim_head)), persistent=False)
        self.register_buffer("buckets_NM", distance_buckets(positions, positions + 1), persistent=False)

    def forward(
        self,
        noisy_BLD: torch.Tensor,
        times_B: torch.Tensor,
        condition_BLD: torch.Tensor,
        keep_condition_B: torch.Tensor | None = None,
        keep_target_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the predicted target (B, L, D).

        Args:
            noisy_BLD: Noisy target.
            times_B: Integer times (0 is the least noisy).
            condition_BLD: Condition tokens.
            keep_condition_B: Samples that keep their condition (boolean; none: all); the others get ``null_brain``.
            keep_target_B: Samples that keep their noisy target; the others get ``null_image``.
        """
        if keep_condition_B is not None:
            condition_BLD = torch.where(keep_condition_B[:, None, None], condition_BLD, self.null_brain)
        if keep_target_B is not None:
            noisy_BLD = torch.where(keep_target_B[:, None, None], noisy_BLD, self.null_image)
        time_B1D = self.time(time_embedding(times_B, self._width).to(noisy_BLD.dtype))[:, None]
        x_BND = torch.cat([condition_BLD, time_B1D, noisy_BLD + self.learned_query], dim=1)
        bias_ANM = self.relative_attention_bias(self.buckets_NM).permute(2, 0, 1)
        for layer in self.layers:
            x_BND = layer(x_BND, self.rotary_2NR, bias_ANM)
        predicted_BLD: torch.Tensor = self.project_out(self.norm(x_BND))[:, -self._num_tokens :]
        return predicted_BLD


def time_embedding(times_B: torch.Tensor, width: int) -> torch.Tensor:
    """Return (B, width) float32 ``[sin | cos]`` of the times at ``width / 2`` geometric frequencies."""
    half = width // 2
    steps = torch.arange(half, device=times_B.device, dtype=torch.float32)
    angles_BD = times_B.float()[:, None] * torch.exp(steps * (-math.log(TIME_PERIOD) / (half - 1)))
    return torch.cat([angles_BD.sin(), angles_BD.cos()], dim=-1)


def rotary_table(num_positions: int, rotary_dim: int) -> torch.Tensor:
    """Return (2, N, R) float32: cosine and sine of every position's angles, each repeated for an interleaved pair."""
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))
    angles_NR = (torch.arange(num_positions).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)
    return torch.stack([angles_NR.cos(), angles_NR.sin()])


def rotate(x: torch.Tensor, rotary_2NR: torch.Tensor) -> torch.Tensor:
    """Return ``x`` (..., N, E) with its first R columns rotated by position (interleaved pairs)."""
    cosine, sine = rotary_2NR.to(x.dtype)
    head, tail = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    even, odd = head.reshape(*head.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([head * cosine + turned * sine, tail], dim=-1)


def distance_buckets(num_queries: int, num_keys: int) -> torch.Tensor:
    """Return (N, M) int64 buckets of T5's one-sided relative distance; key 0 is the null key, so token j is key j+1.

    All keys after a query share bucket 0; distances below 16 are exact, larger ones logarithmic up to 128.
    """
    distance_NM = (torch.arange(num_queries)[:, None] - torch.arange(num_keys)[None]).clamp(min=0)
    exact = NUM_BUCKETS // 2
    ratio = torch.log(distance_NM.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    large_NM = (exact + (ratio * (NUM_BUCKETS - exact)).long()).clamp(max=NUM_BUCKETS - 1)
    return torch.where(distance_NM < exact, distance_NM, large_NM)
