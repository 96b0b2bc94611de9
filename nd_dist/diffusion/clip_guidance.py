"""The paper's guidance: CLIP features of several layers, weighted by the inverse norm of their targets.

L = sum_l w_l mean((f_l - g_l)^2), w_l = a_l (1 / ||g_l||) / sum_k (1 / ||g_k||), every sample with its own norms.
Source: NeuralDiffuser, section III-C; the factors a are the released code's, applied after normalising.
Shape suffixes: B batch, K guidance layers, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nd_dist.diffusion.guidance import ImageEstimate, require_target
from nd_dist.errors import ConfigError
from nd_dist.frozen.clip_vision import ClipVision, layer_name

WEIGHTS = "weights"


def layer_weights(norms_BK: torch.Tensor, layer_scale: Sequence[float]) -> torch.Tensor:
    """Return the weights w (B, K) of the layers, from each sample's own target norms."""
    inverse = 1.0 / norms_BK
    shares = inverse / inverse.sum(dim=1, keepdim=True)
    return shares * shares.new_tensor(layer_scale)


def weighted_loss(
    features: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], weights_BK: torch.Tensor
) -> torch.Tensor:
    """Return each sample's weighted sum over layers of the mean squared feature difference, (B,)."""
    errors_BK = torch.stack(
        [
            (feature.to(target.dtype) - target).square().flatten(1).mean(dim=1)
            for feature, target in zip(features, targets, strict=True)
        ],
        dim=1,
    )
    return (weights_BK * errors_BK).sum(dim=1)


class ClipGuidance:
    """Pulls the image estimate towards the CLIP features g02 .. g12.

    Args:
        clip: The guidance CLIP; the one that the targets were made with.
        layer_scale: Factor a_l of each layer.
        antialias: As the targets were made.
        normalize: As the targets were made, ``imagenet`` or ``clip``.
        layers: Names of the layers, ``g02`` or ``Linear-2`` and so on; none takes all.

    Raises:
        ConfigError: the factors do not match the layers.
    """

    def __init__(
        self,
        clip: ClipVision,
        layer_scale: Sequence[float],
        antialias: bool = False,
        normalize: str = "imagenet",
        layers: Sequence[str] | None = None,
    ) -> None:
        names = clip.layer_names if layers is None else tuple(layer_name(layer) for layer in layers)
        if len(names) != len(layer_scale):
            raise ConfigError(
                "sampler.layer_scale needs one factor per guidance layer.",
                expected=f"{len(names)} factors, for {', '.join(names)}",
                found=f"{len(layer_scale)} factors",
            )
        self._clip, self._layer_scale, self._names = clip, tuple(layer_scale), tuple(names)
        self._antialias, self._normalize = antialias, normalize

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers."""
        return self._names

    def prepare(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the target features (B, L, D) of every layer, float32 or wider, and the weights (B, K).

        Raises:
            DataError: a layer's target is missing or has another shape (another guidance model made it).
        """
        wide = torch.promote_types(self._clip.dtype, torch.float32)
        shapes = self._clip.feature_shapes
        features = {name: require_target(targets, name, shapes[name]).to(wide) for name in self._names}
        norms_BK = torch.stack([value.flatten(1).norm(dim=1) for value in features.values()], dim=1)
        return {**features, WEIGHTS: layer_weights(norms_BK, self._layer_scale)}

    def loss(self, estimate: ImageEstimate, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return each sample's weighted feature difference."""
        taps = dict(
            zip(
                self._clip.layer_names,
                self._clip.features(estimate.pixels_BCHW, self._antialias, self._normalize),
                strict=True,
            )
        )
        features, targets = zip(*((taps[name], prepared[name]) for name in self._names), strict=True)
        return weighted_loss(features, targets, prepared[WEIGHTS])
