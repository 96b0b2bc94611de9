"""Training batches: every row is a function of (seed, step, row), so any number of ranks sees the same rows.

Legend: B rows, C channels, H height, W width, O object classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nd_dist.seeds import unit_seed
from shards.phantom.backgrounds import PLACES
from shards.phantom.pictures import render, training_scene
from shards.phantom.scenes import Scene
from shards.phantom.sprites import sprite_index

PLACE_INDEX = {place: index for index, place in enumerate(PLACES)}


@dataclass(frozen=True)
class Rows:
    """Which rows of the endless training stream a step needs.

    Args:
        seed: Seed of the stream; every network has its own.
        step: Optimizer step, 0-based.
        rows: Row numbers within the step's global batch.
        device: Where tensors go.
    """

    seed: int
    step: int
    rows: range
    device: torch.device

    def scenes(self) -> list[Scene]:
        """Return the rows' scenes."""
        return [training_scene(self.seed, self.step, row) for row in self.rows]

    def generators(self, purpose: str) -> list[np.random.Generator]:
        """Return one generator per row for a named purpose."""
        seeds = (unit_seed(self.seed, purpose, self.step, row) for row in self.rows)
        return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

    def normal(self, purpose: str, *shape: int) -> torch.Tensor:
        """Return standard normal draws (B, *shape) float32."""
        draws = [generator.standard_normal(shape, dtype=np.float32) for generator in self.generators(purpose)]
        return torch.from_numpy(np.stack(draws)).to(self.device)

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Return draws (B,) int64 in 0..high-1."""
        return torch.tensor([int(generator.integers(high)) for generator in self.generators(purpose)]).to(self.device)


def pixels_of(scenes: Sequence[Scene], device: torch.device) -> torch.Tensor:
    """Return the pictures of scenes, (B, 3, 64, 64) float32 in [0, 1]."""
    pixels_BHWC = np.stack([render(scene) for scene in scenes])
    pixels_BCHW = torch.from_numpy(pixels_BHWC).to(device).permute(0, 3, 1, 2).contiguous()
    return pixels_BCHW.float() / 255


def labels_of(scenes: Sequence[Scene], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return soft object labels (B, O), which sum to 1 over a scene's one or two things, and place indices (B,)."""
    objects_BO = torch.zeros(len(scenes), len(sprite_index()))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            objects_BO[row, sprite_index()[thing.name]] += 1 / len(scene.things)
    places_B = torch.tensor([PLACE_INDEX[scene.place] for scene in scenes])
    return objects_BO.to(device), places_B.to(device)
