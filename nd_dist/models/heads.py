"""Heads: from the shared space to one target. Token heads (c, g) and the latent head (z).

Legend of shape suffixes: B samples, S sequence, H hidden width, L tokens, D token width, C channels, H W height and
width of a map (in BCHW), P positions of a map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.config import DecoderConfig
from nd_dist.errors import ConfigError
from nd_dist.models.backbone import Backbone, Mixer
from nd_dist.models.brain_tokens import TokenBackbone
from nd_dist.models.draws import Draws, dropout
from nd_dist.models.prior import DiffusionPrior
from nd_dist.models.upsampler import Upsampler
from nd_dist.schema import TargetSpec

STUDENT_WIDTH = 512
"""Width of the student map: the teacher's projection has 512 channels."""


class TokenOutput(NamedTuple):
    """Backbone tokens (B, L, D), and the tokens (B, L, D) that the contrastive loss compares with the target."""

    backbone_BLD: torch.Tensor
    contrastive_BLD: torch.Tensor


class LatentOutput(NamedTuple):
    """Predicted latent (B, C, H, W), and the student rows (B, P, 512); None without a student map."""

    latent_BCHW: torch.Tensor
    student_BPD: torch.Tensor | None


class TokenHead(nn.Module):
    """Backbone, contrastive projector and diffusion prior of one token target.

    With ``prior_depth=0`` there is no prior: the backbone itself is the prediction.

    Args:
        config: The decoder's configuration.
        spec: The target; its shape is (L, D).
        seq_len: Sequence length S.

    Raises:
        ConfigError: the target has no (L, D) shape.
    """

    def __init__(self, config: DecoderConfig, spec: TargetSpec, seq_len: int = 1) -> None:
        super().__init__()
        if len(spec.shape) != 2:
            raise ConfigError("A token target needs (tokens, width).", where=spec.name, found=spec.shape)
        num_tokens, width = spec.shape
        self.backbone = _backbone(config, spec.name, (num_tokens, width), seq_len)
        projection = [(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)) for _ in range(3)]  # "clip_voxels"
        self.contrastive = nn.Sequential(*(layer for group in projection for layer in group))
        self.prior = DiffusionPrior.from_config(config, spec) if config.prior_depth else None

    def forward(self, x_BSH: torch.Tensor, draws: Draws | None = None) -> TokenOutput:
        """Return the head's outputs for (B, S, H)."""
        backbone_BLD = self.backbone(x_BSH, draws)
        return TokenOutput(backbone_BLD, self.contrastive(backbone_BLD))

    def denoised(
        self, backbone_BLD: torch.Tensor, target_BLD: torch.Tensor, draws: Draws, has_drops: bool = True
    ) -> torch.Tensor:
        """Return the prior's training prediction of the target (B, L, D); without a prior the backbone's tokens.

        Args:
            backbone_BLD: The backbone's tokens, the prior's condition.
            target_BLD: The target.
            draws: Random numbers of the B rows: times, noise and drops.
            has_drops: Whether some rows lose their condition or target, as in training.
        """
        if self.prior is None:
            return backbone_BLD
        drawn = self.prior.draw(draws, (target_BLD.shape[1], target_BLD.shape[2]))
        if not has_drops:
            kept = torch.ones_like(drawn.keep_target_B)
            drawn = drawn._replace(keep_condition_B=kept, keep_target_B=kept)
        predicted_BLD: torch.Tensor = self.prior(backbone_BLD, target_BLD, drawn)
        return predicted_BLD


def _backbone(config: DecoderConfig, name: str, tokens: tuple[int, int], seq_len: int) -> Backbone | TokenBackbone:
    """Return what maps the shared space to a target's tokens, as ``config.kind`` says."""
    if config.kind == "tokens":
        return TokenBackbone(config, tokens, name)
    mixer = Mixer(config.hidden_size, config.num_blocks, config.mixer, config.backbone_dropout, name, seq_len)
    return Backbone(mixer, config.hidden_size, tokens, seq_len)


class ResidualBlock(nn.Module):
    """``x + dropout(SiLU(LayerNorm(Linear(x))))``.

    Args:
        width: Width H.
        drop: Dropout probability.
        name: Purpose of its draws.
    """

    def __init__(self, width: int, drop: float, name: str) -> None:
        super().__init__()
        self._drop, self._name = drop, name
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BH: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return (B, H)."""
        return dropout(F.silu(self.norm(self.linear(x_BH))), self._drop, draws, self._name) + x_BH


def latent_downscale(config: DecoderConfig) -> int:
    """Return how many times smaller than the latent the map is from which the latent head starts."""
    return int(2 ** (len(config.initial_channels) - 1))


class LatentHead(nn.Module):
    """Residual blocks, a linear map to a small feature map, and a VAE decoder that upsamples it to the latent.

    Args:
        config: The decoder's configuration.
        spec: The target; its shape is (C, H, W) with H and W divisible by the up blocks' factor (4).
        shared: Whether its input is the joint decoder's space; then LayerNorm, SiLU and dropout, which the published
            z encoder has per subject, come first here.
        student: Whether to build the student map (only a teacher gives it a gradient).

    Raises:
        ConfigError: the target has no such shape.

    Source: NeuralDiffuser's Voxel2StableDiffusionModel, 4x mode (after MindEye's low-level pipeline).
    """

    def __init__(self, config: DecoderConfig, spec: TargetSpec, shared: bool, student: bool = False) -> None:
        super().__init__()
        channels, factor = config.initial_channels, latent_downscale(config)
        if len(spec.shape) != 3 or spec.shape[1] % factor or spec.shape[2] % factor:
            raise ConfigError(
                "The latent target cannot be made by the up blocks.",
                where=f"target {spec.name}, decoder.initial_channels",
                expected=f"(channels, height, width) with height and width divisible by {factor}",
                found=spec.shape,
            )
        hidden, self._drop, self._name = config.hidden_size, config.initial_voxel_dropout, spec.name
        self._map_shape = (channels[0], spec.shape[1] // factor, spec.shape[2] // factor)
        self.entry_norm = nn.LayerNorm(hidden) if shared else None
        self.blocks = nn.ModuleList(
            ResidualBlock(hidden, config.initial_dropout, f"{spec.name}/block_{i}") for i in range(config.num_blocks)
        )
        self.linear = nn.Linear(hidden, channels[0] * self._map_shape[1] * self._map_shape[2], bias=False)
        self.norm = nn.GroupNorm(1, channels[0])
        self.upsampler = Upsampler(channels[0], spec.shape[0], channels)
        self.student = student_map(channels[0]) if student else None

    def forward(self, x_BH: torch.Tensor, draws: Draws | None = None) -> LatentOutput:
        """Return the head's outputs for (B, H)."""
        if self.entry_norm is not None:
            x_BH = dropout(F.silu(self.entry_norm(x_BH)), self._drop, draws, f"{self._name}/entry")
        for block in self.blocks:
            x_BH = block(x_BH, draws)
        map_BCHW = self.norm(self.linear(x_BH).unflatten(1, self._map_shape))
        rows_BPD = None if self.student is None else self.student(map_BCHW).flatten(2).transpose(1, 2)
        return LatentOutput(self.upsampler(map_BCHW), rows_BPD)


def student_map(channels: int) -> nn.Sequential:
    """Return 1x1 convolutions that project a feature map of so many channels to the teacher's width."""
    return nn.Sequential(
        nn.Conv2d(channels, STUDENT_WIDTH, 1, bias=False),
        nn.GroupNorm(1, STUDENT_WIDTH),
        nn.ReLU(),
        nn.Conv2d(STUDENT_WIDTH, STUDENT_WIDTH, 1, bias=False),
        nn.GroupNorm(1, STUDENT_WIDTH),
        nn.ReLU(),
        nn.Conv2d(STUDENT_WIDTH, STUDENT_WIDTH, 1),
    )
