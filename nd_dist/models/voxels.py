"""Voxel encoders: one small map per subject into the space that all subjects share. Only they know subjects.

Legend of shape suffixes: B samples, V voxels of one subject, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from nd_dist.models.draws import Draws, dropout

Exchange = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Gives a rank its own rows of every subject (B_s, H), given what its part of the linear maps makes of all rows."""


def _keep(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Exchange nothing: the linear maps are whole, and their rows are this rank's."""
    return parts


class RidgeEncoder(nn.Module):
    """One affine map per subject (targets c and g, and the shared space of the joint decoder).

    Args:
        num_voxels: Subject -> number of voxels.
        hidden_size: Width H of the shared space.

    Source: NeuralDiffuser, voxel encoder of the semantic and guidance decoders; MindEyeV2, ridge regression.
    """

    def __init__(self, num_voxels: Mapping[int, int], hidden_size: int) -> None:
        super().__init__()
        self.subjects = nn.ModuleDict({str(s): nn.Linear(count, hidden_size) for s, count in num_voxels.items()})
        self.exchange: Exchange = _keep

    def forward(self, voxels: Mapping[int, torch.Tensor], draws: Draws | None = None) -> torch.Tensor:
        """Return (B, H): the rows of ``voxels`` (subject -> (B_s, V_s) z-scored betas) in the mapping's order."""
        return torch.cat(self.exchange([self.subjects[str(s)](voxels_BV) for s, voxels_BV in voxels.items()]))


class NormalizedEncoder(nn.Module):
    """Linear (no bias), LayerNorm, SiLU, dropout per subject (target z).

    Args:
        num_voxels: Subject -> number of voxels.
        hidden_size: Width H of the shared space.
        drop: Dropout probability.
        name: Prefix of the draws' purposes.

    Source: NeuralDiffuser, voxel encoder of the initial-reconstruction decoder.
    """

    def __init__(self, num_voxels: Mapping[int, int], hidden_size: int, drop: float, name: str) -> None:
        super().__init__()
        self._drop, self._name = drop, name
        self.subjects = nn.ModuleDict(
            {
                str(s): nn.Sequential(nn.Linear(count, hidden_size, bias=False), nn.LayerNorm(hidden_size))
                for s, count in num_voxels.items()
            }
        )
        self.exchange: Exchange = _keep

    def forward(self, voxels: Mapping[int, torch.Tensor], draws: Draws | None = None) -> torch.Tensor:
        """Return (B, H) like ``RidgeEncoder``; ``draws`` of all B rows switch dropout on."""
        encoders = [cast(nn.Sequential, self.subjects[str(subject)]) for subject in voxels]
        parts = self.exchange([own[0](voxels_BV) for own, voxels_BV in zip(encoders, voxels.values(), strict=True)])
        hidden_BH = torch.cat([own[1](part_BH) for own, part_BH in zip(encoders, parts, strict=True)])
        return dropout(F.silu(hidden_BH), self._drop, draws, f"{self._name}/voxels")
