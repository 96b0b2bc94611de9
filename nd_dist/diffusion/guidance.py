"""Guidance as an object: it looks at an estimate of the image and says how far each sample is from its targets.

The sampler differentiates the loss; it knows nothing of what it measures. Losses are per sample: a sample's gradient
then does not depend on the batch it rides in. Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F

from nd_dist.errors import DataError
from nd_dist.schema import INITIAL

Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ImageEstimate:
    """The image that the sampler is heading for, as latents and, decoded when asked for, as pixels.

    Args:
        latents_BCHW: Scaled latents (x 0.18215 for Stable Diffusion).
        decode: The VAE's decoder, differentiable.
    """

    latents_BCHW: torch.Tensor
    decode: Decode

    @cached_property
    def pixels_BCHW(self) -> torch.Tensor:  # noqa: N802 - shape suffix
        """Pixels clamped to [0,1] (no gradient outside), float32 or wider."""
        decoded = self.decode(self.latents_BCHW)
        return ((decoded.to(self.latents_BCHW.dtype) + 1.0) / 2.0).clamp(0.0, 1.0)


class Guidance(Protocol):
    """What the sampler needs of a guidance term."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that it pulls towards."""
        ...

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Check the targets and return all that ``loss`` needs, each tensor with one row per sample."""
        ...

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of each sample, (B,), differentiable in ``estimate.latents_BCHW``."""
        ...


def require_target(targets: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return target ``name`` of shape (B, *shape).

    Raises:
        DataError: it is missing or has another shape.
    """
    found = tuple(targets[name].shape[1:]) if name in targets else "missing"
    if found != shape:
        raise DataError(
            f"Guidance target {name} does not fit the guidance network.",
            expected=f"(B, {', '.join(map(str, shape))})",
            found=found if found == "missing" else f"(B, {', '.join(map(str, found))})",
            todo="train and sample with the guidance model that the targets were made with",
        )
    return targets[name]


class LatentGuidance:
    """Pulls the latent estimate itself towards the initial target z: no decoder, no CLIP.

    Args:
        latent_shape: Shape (C, H, W) of one latent.
        target: Name of the target.
    """

    def __init__(self, latent_shape: tuple[int, int, int], target: str = INITIAL) -> None:
        self._shape, self._target, self.targets = latent_shape, target, (target,)

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the target latents."""
        return {self._target: require_target(targets, self._target, self._shape)}

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return each sample's mean squared difference of latents."""
        return (estimate.latents_BCHW - prepared[self._target]).square().flatten(1).mean(dim=1)


class PixelGuidance:
    """Pulls the decoded image towards a target picture of any resolution (a coarse one guides layout and colour).

    Args:
        resolution: Side of the square target pictures.
        target: Name of the target: pixels (B, 3, resolution, resolution) in [0,1], or what ``decode`` makes pixels of.
        decode: Makes larger pixels of the target, e.g. of the initial latents (B, C, H, W); none: it is pixels.
    """

    def __init__(self, resolution: int, target: str = "pixels", decode: Decode | None = None) -> None:
        self._resolution, self._target, self._decode, self.targets = resolution, target, decode, (target,)

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the target pixels."""
        if self._decode is not None and self._target in targets:
            with torch.no_grad():
                decoded = ImageEstimate(targets[self._target], self._decode).pixels_BCHW
            return {self._target: F.adaptive_avg_pool2d(decoded, self._resolution)}
        shape = (3, self._resolution, self._resolution)
        return {self._target: require_target(targets, self._target, shape)}

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return each sample's mean squared difference of area-averaged pixels."""
        averaged = F.adaptive_avg_pool2d(estimate.pixels_BCHW, self._resolution)
        return (averaged - prepared[self._target]).square().flatten(1).mean(dim=1)


class SumOfGuidance:
    """Several terms at once.

    Args:
        terms: Name -> the term and its weight.
    """

    def __init__(self, terms: Mapping[str, tuple[Guidance, float]]) -> None:
        self._terms = terms
        self.targets = tuple(dict.fromkeys(name for term, _ in terms.values() for name in term.targets))

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what every term prepares, under the term's name."""
        return {
            f"{name}/{key}": values
            for name, (term, _) in self._terms.items()
            for key, values in term.prepare({each: targets[each] for each in term.targets if each in targets}).items()
        }

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return each sample's weighted sum of the terms' losses."""
        losses = []
        for name, (term, weight) in self._terms.items():
            own = {
                key.removeprefix(f"{name}/"): values for key, values in prepared.items() if key.startswith(f"{name}/")
            }
            losses.append(weight * term.loss(estimate, own))
        return torch.stack(losses).sum(dim=0)
