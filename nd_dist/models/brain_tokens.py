"""A decoder that is not linear: voxels pooled into brain tokens, mixed by a transformer, asked for target tokens.

The shared space is cut into brain tokens: a token is what a subject's own linear map pools from its voxels, and an
embedding that all subjects share says which token it is. A head mixes them, and learned queries, one for each token of
the target, attend to the result.

Legend of shape suffixes: B samples, H hidden width, K brain tokens, E width of one (K E = H), L target tokens, D their
width.

Source: the structure follows this field's token decoders (Brain-IT's brain tokens, MindEye2's shared space).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.config import DecoderConfig
from nd_dist.errors import ConfigError
from nd_dist.models.backbone import MixerMLP
from nd_dist.models.draws import Draws

HEAD_WIDTH = 32
FEEDFORWARD_FACTOR = 4
SMALL = 0.02
"""Deviation of embeddings and queries at the start."""


class Attention(nn.Module):
    """Attention of some tokens to others, several heads, with a norm before it.

    Args:
        width: Token width E.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._num_heads = max(1, width // HEAD_WIDTH)
        self.norm = nn.LayerNorm(width)
        self.to_query, self.to_key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BLE: torch.Tensor, seen_BKE: torch.Tensor) -> torch.Tensor:
        """Return the update (B, L, E) of ``x_BLE`` by what it finds in ``seen_BKE``."""
        query, key, value = (
            part.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
            for part in (self.to_query(self.norm(x_BLE)), *self.to_key_value(seen_BKE).chunk(2, dim=-1))
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        update_BLE: torch.Tensor = self.to_out(mixed)
        return update_BLE


class TokenBackbone(nn.Module):
    """From the shared space to a target's tokens, through brain tokens; stands where ``Backbone`` does.

    Args:
        config: ``hidden_size`` H, ``brain_tokens`` K, ``num_blocks`` layers, ``backbone_dropout``.
        tokens: (L, D) of the target.
        name: Prefix of the draws' purposes.

    Raises:
        ConfigError: the brain tokens do not divide the hidden width.
    """

    def __init__(self, config: DecoderConfig, tokens: tuple[int, int], name: str) -> None:
        super().__init__()
        num, (length, target_width) = config.brain_tokens, tokens
        width, rest = divmod(config.hidden_size, num)
        if rest or width % min(width, HEAD_WIDTH):
            raise ConfigError(
                "The shared space cannot be cut into brain tokens.",
                where="decoder.hidden_size, decoder.brain_tokens",
                expected=f"a multiple of {HEAD_WIDTH} as hidden_size / brain_tokens",
                found=f"{config.hidden_size} / {num}",
            )
        self.place = nn.Parameter(SMALL * torch.randn(num, width))
        self.queries = nn.Parameter(SMALL * torch.randn(length, width))
        self.attention = nn.ModuleList(Attention(width) for _ in range(config.num_blocks))
        self.feedforward = nn.ModuleList(
            MixerMLP(width, config.backbone_dropout, f"{name}/token_layer_{i}", FEEDFORWARD_FACTOR)
            for i in range(config.num_blocks)
        )
        self.asking = Attention(width)
        self.answer = MixerMLP(width, config.backbone_dropout, f"{name}/token_answer", FEEDFORWARD_FACTOR)
        self.norm = nn.LayerNorm(width)
        self.to_target = nn.Linear(width, target_width)

    def forward(self, x_B1H: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return (B, L, D)."""
        x_BKE = x_B1H.view(-1, *self.place.shape) + self.place
        for attention, feedforward in zip(self.attention, self.feedforward, strict=True):
            x_BKE = x_BKE + attention(x_BKE, x_BKE)
            x_BKE = x_BKE + feedforward(x_BKE, draws)
        asked_BLE = self.queries.expand(len(x_BKE), -1, -1)
        asked_BLE = asked_BLE + self.asking(asked_BLE, x_BKE)
        asked_BLE = asked_BLE + self.answer(asked_BLE, draws)
        tokens_BLD: torch.Tensor = self.to_target(self.norm(asked_BLE))
        return tokens_BLD
