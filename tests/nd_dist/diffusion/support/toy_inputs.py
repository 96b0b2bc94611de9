"""Targets for a few samples of the toy networks, each sample from its own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.stable_diffusion import StableDiffusion

LAYER_SCALE = (1.5, 1.2, 1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Inputs:
    c: torch.Tensor
    z: torch.Tensor
    targets: Mapping[str, torch.Tensor]
    requests: Sequence[NoiseRequest]

    def rows(self, *rows: int) -> Inputs:
        picked = list(rows)
        targets = {name: values[picked] for name, values in self.targets.items()}
        return Inputs(self.c[picked], self.z[picked], targets, [self.requests[row] for row in picked])

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], Sequence[NoiseRequest]]:
        return self.c, self.z, self.targets, self.requests


def make_inputs(sd: StableDiffusion, clip: ClipVision, num: int = 3, run_seed: int = 0) -> Inputs:
    """Targets of pictures that do exist: embeddings of made-up pictures and captions."""
    generator = torch.Generator().manual_seed(100 + run_seed)
    size = sd.picture_size
    coarse = torch.rand(num, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    captions = ["a red dog", "sky", "two cats on a mat", "sea and sand", "a b c"][:num]
    with torch.no_grad():
        features = clip.features(pixels)
    return Inputs(
        c=sd.encode_text(captions),
        z=sd.encode_image(pixels * 2 - 1),
        targets=dict(zip(clip.layer_names, features, strict=True)),
        requests=[NoiseRequest(image_id=10 + row, repeat=0, run_seed=run_seed) for row in range(num)],
    )
