"""The backbone of the token decoders: a mixer over the shared space, then one linear map to all tokens.

With one time point per sample (sequence length 1, the only published setting) every token-mixing block sees a single
number per channel: its LayerNorm returns its bias whatever the input, so the block is a constant, and the published
second residual chain carries the block input past all hidden-mixing blocks. The published mixer therefore is exactly
``x + k_1 + ... + k_n`` with scalars k: this file computes and stores just that (see docs on the affine shortcut).

Legend of shape suffixes: B samples, S sequence, H hidden width, N blocks, L tokens, D token width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.models.draws import Draws, dropout

MixerForm = Literal["official", "single_residual"]


class MixerMLP(nn.Module):
    """LayerNorm, Linear, GELU, dropout, Linear over the last axis.

    Args:
        width: Size of the last axis.
        drop: Dropout probability of the hidden units.
        name: Purpose of its draws.
        factor: Hidden units for each of the last axis.
    """

    def __init__(self, width: int, drop: float, name: str, factor: int = 1) -> None:
        super().__init__()
        self._drop, self._name = drop, name
        self.norm = nn.LayerNorm(width)
        self.linear_in = nn.Linear(width, factor * width)
        self.linear_out = nn.Linear(factor * width, width)

    def forward(self, values: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return a tensor of the shape of ``values`` (B, ..., width)."""
        hidden = F.gelu(self.linear_in(self.norm(values)))
        mixed: torch.Tensor = self.linear_out(dropout(hidden, self._drop, draws, self._name))
        return mixed


class TokenShifts(nn.Module):
    """All token-mixing blocks at sequence length 1: one scalar per block, per channel in training.

    The five scalars of a block are those of the full block that have a gradient: LayerNorm's bias and both 1x1 linear
    maps. LayerNorm's weight is multiplied by zero there, so it is not stored.

    Args:
        num_blocks: Number N of blocks.
        drop: Dropout probability of the hidden unit.
        name: Purpose of its draws.
    """

    def __init__(self, num_blocks: int, drop: float, name: str) -> None:
        super().__init__()
        self._drop, self._name = drop, name
        self.norm_bias = nn.Parameter(torch.zeros(num_blocks))
        # nn.Linear(1, 1) draws weight and bias from U(-1, 1)
        self.in_weight = nn.Parameter(torch.empty(num_blocks).uniform_(-1, 1))
        self.in_bias = nn.Parameter(torch.empty(num_blocks).uniform_(-1, 1))
        self.out_weight = nn.Parameter(torch.empty(num_blocks).uniform_(-1, 1))
        self.out_bias = nn.Parameter(torch.empty(num_blocks).uniform_(-1, 1))

    def forward(self, hidden_size: int, draws: Draws | None = None) -> torch.Tensor:
        """Return the shifts k: (1, N, 1) in evaluation, (B, N, H) in training (dropout differs per channel)."""
        unit_1N1 = F.gelu(self.in_weight * self.norm_bias + self.in_bias)[None, :, None]
        if draws is not None and self._drop > 0:
            keep_BNH = draws.keep(self._name, self._drop, unit_1N1.shape[1], hidden_size)
            unit_1N1 = unit_1N1 * keep_BNH.to(unit_1N1.dtype) / (1.0 - self._drop)
        return self.out_weight[:, None] * unit_1N1 + self.out_bias[:, None]


class Mixer(nn.Module):
    """The mixer of the shared space.

    official: with hidden-mixing blocks M1 and token-mixing blocks M2, ``x = M1(x) + r1; r1 = x; y = M2(x^T) + r2;
    r2 = y; x = y^T``; at sequence length 1 the exact shortcut without any M1.
    single_residual: the repaired form with one residual chain, ``x = x + M1(x); x = x + M2(x^T)^T``.

    Args:
        hidden_size: Width H.
        num_blocks: Number N of blocks.
        form: Which of the two.
        drop: Dropout probability.
        name: Prefix of the draws' purposes.
        seq_len: Sequence length S.

    Source: NeuralDiffuser's BrainNetwork (after MindEyeV2); the repair is this project's.
    """

    def __init__(
        self, hidden_size: int, num_blocks: int, form: MixerForm, drop: float, name: str, seq_len: int = 1
    ) -> None:
        super().__init__()
        self._form, self._num_blocks, self._seq_len = form, num_blocks, seq_len
        if form == "single_residual" or seq_len > 1:
            self.hidden_blocks = nn.ModuleList(
                MixerMLP(hidden_size, drop, f"{name}/mixer_hidden_{i}") for i in range(num_blocks)
            )
        if seq_len > 1:
            self.token_blocks = nn.ModuleList(
                MixerMLP(seq_len, drop, f"{name}/mixer_token_{i}") for i in range(num_blocks)
            )
        else:
            self.token_shifts = TokenShifts(num_blocks, drop, f"{name}/mixer_token")

    def forward(self, x_BSH: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return the mixed (B, S, H)."""
        if self._seq_len > 1:
            return self._full(x_BSH, draws)
        shifts_BNH: torch.Tensor = self.token_shifts(x_BSH.shape[-1], draws)
        if self._form == "official":
            return x_BSH + shifts_BNH.sum(dim=1, keepdim=True)
        for i in range(self._num_blocks):
            x_BSH = x_BSH + self.hidden_blocks[i](x_BSH, draws) + shifts_BNH[:, i : i + 1]
        return x_BSH

    def _full(self, x_BSH: torch.Tensor, draws: Draws | None) -> torch.Tensor:
        """Return the mixer's output where token mixing is alive (sequence length above 1)."""
        residual_1, residual_2 = x_BSH, x_BSH.transpose(1, 2)
        for i in range(self._num_blocks):
            x_BSH = residual_1 = self.hidden_blocks[i](x_BSH, draws) + residual_1
            if self._form == "single_residual":
                residual_2 = x_BSH.transpose(1, 2)
            y_BHS = residual_2 = self.token_blocks[i](x_BSH.transpose(1, 2), draws) + residual_2
            x_BSH = y_BHS.transpose(1, 2)
            if self._form == "single_residual":
                residual_1 = x_BSH
        return x_BSH


class Backbone(nn.Module):
    """Mixer, then a linear map of the flattened sequence to all tokens.

    Args:
        mixer: The mixer; its sequence length and width must be ``seq_len`` and ``hidden_size``.
        hidden_size: Width H.
        tokens: (L, D) of the target.
        seq_len: Sequence length S.
    """

    def __init__(self, mixer: Mixer, hidden_size: int, tokens: tuple[int, int], seq_len: int = 1) -> None:
        super().__init__()
        self._tokens = tokens
        self.mixer = mixer
        self.linear = nn.Linear(seq_len * hidden_size, tokens[0] * tokens[1])

    def forward(self, x_BSH: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return (B, L, D), token-major."""
        tokens: torch.Tensor = self.linear(self.mixer(x_BSH, draws).flatten(1)).unflatten(1, self._tokens)
        return tokens
