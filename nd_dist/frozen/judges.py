"""The metric networks ("judges"): what a judge is, and the small ones of the phantom world.

The field's own are in ``field_judges``, those that only some papers use in ``optional_judges``. Which metric a judge's
features feed is said by its ``score``. Legend: B pictures, C = 3 channels, H height, W width, D feature values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from nd_dist.files import sha256_file
from nd_dist.pixels import Normalization, Resize

Score = Literal["two_way", "distance", "distribution"]
Statistics = Literal["imagenet", "clip", "none"]


@runtime_checkable
class Judge(Protocol):
    """A frozen network whose features compare a reconstruction with a picture."""

    @property
    def name(self) -> str:
        """Name of the metric that its features feed, e.g. ``alexnet_2``."""
        ...

    @property
    def score(self) -> Score:
        """Two-way identification (higher is better), correlation distance (lower is better), or FID and KID."""
        ...

    @property
    def identity(self) -> str:
        """Text that changes whenever its features would: weights' hash and input settings."""
        ...

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return flattened features (B, D) float32 of pixels in [0,1] of any size."""
        ...


@runtime_checkable
class PairJudge(Protocol):
    """A frozen network that compares two pictures directly, because its features are too many to keep."""

    @property
    def name(self) -> str:
        """Name of its metric, e.g. ``lpips``."""
        ...

    @property
    def identity(self) -> str:
        """Text that changes whenever its values would."""
        ...

    def distances(self, recons_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
        """Return the distance (B,) float64 of each pair; pixels in [0,1], both of one size."""
        ...


@dataclass(frozen=True)
class NetworkJudge:
    """A judge made of a torch network: resize, normalise, run, flatten.

    Args:
        name: Metric name.
        score: Which comparison its features are for.
        identity: Weights' hash and settings, see ``Judge``.
        network: Maps prepared pixels to features of any shape (B, ...).
        prepare: Resizes and normalises; judges that do so alike share one.
        named: Maps features (B, D) to the probabilities (B, O) of the classes that the network was trained to name,
            where it was trained for classes that tell the kind of thing; None: its features tell it.
    """

    name: str
    score: Score
    identity: str
    network: Callable[[Tensor], Tensor]
    prepare: Preparation
    named: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, D) float32 on the CPU."""
        return self.network(self.prepare(pixels_BCHW)).flatten(1).float().cpu()


class Preparation:
    """Brings pictures to a network's input; the tensor that was given last is not prepared again.

    So a tensor of pictures must not be changed in place once a judge has seen it.

    Args:
        resize: To the network's input size.
        statistics: Pixel mean and standard deviation; ``none`` for networks that take [0,1].
        device: Where the network runs.
    """

    def __init__(self, resize: Resize, statistics: Statistics, device: torch.device) -> None:
        self.resize = resize
        self._normalize = None if statistics == "none" else Normalization(statistics)
        self._device = device
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the network's input (B, C, size, size) on its device."""
        if self._last is None or self._last[0] is not pixels_BCHW:
            inputs_BCHW = self.resize(pixels_BCHW.to(self._device))
            if self._normalize is not None:
                inputs_BCHW = self._normalize(inputs_BCHW)
            self._last = pixels_BCHW, inputs_BCHW
        return self._last[1]


class SharedPass:
    """A network with several judges: the pictures that were seen last are not run through it again.

    Args:
        run: Maps inputs to the features of each tap.
    """

    def __init__(self, run: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        self._run = run
        self._last: tuple[Tensor, Mapping[str, Tensor]] | None = None

    def tap(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return a function that gives one tap's features."""

        def features(inputs_BCHW: Tensor) -> Tensor:
            if self._last is None or not _are_equal(self._last[0], inputs_BCHW):
                self._last = inputs_BCHW, self._run(inputs_BCHW)
            return self._last[1][name]

        return features


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two inputs hold the same numbers; far cheaper than a pass of a network."""
    return first is second or (first.shape == second.shape and torch.equal(first, second))


# phantom judge, depth -> what it stands in for: the field's table has four identification columns and a distance
_PHANTOM: tuple[tuple[str, str, Literal["early", "late"], Score], ...] = (
    ("plain_early", "plain", "early", "two_way"),
    ("plain_late", "plain", "late", "two_way"),
    ("residual", "residual", "late", "two_way"),
    ("mixer", "mixer", "late", "two_way"),
    ("depthwise", "depthwise", "late", "distance"),
)
PHANTOM_SIZE = 64


def has_phantom_judges(folder: Path) -> bool:
    """Return whether a folder holds the phantom world's judges."""
    return all((folder / kind / "config.json").is_file() for _, kind, _, _ in _PHANTOM)


def load_phantom_judges(folder: Path, device: torch.device) -> list[Judge]:
    """Load the phantom world's judges: small classifiers, trained apart from the guidance CLIP.

    Args:
        folder: One sub-folder per kind of judge.
        device: Where they run.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    from nd_dist.frozen.phantom_judges import WEIGHTS, load_judges

    networks = {kind: network.to(device) for kind, network in load_judges(folder).items()}
    passes = {kind: SharedPass(_depths_of(network)) for kind, network in networks.items()}
    resize = Resize(PHANTOM_SIZE)
    prepare = Preparation(resize, "none", device)
    judges: list[Judge] = []
    for name, kind, depth, score in _PHANTOM:
        identity = f"{kind}:{sha256_file(folder / kind / WEIGHTS)[:16]}:{depth}:{resize}"
        named = networks[kind].named if depth == "late" else None
        judges.append(NetworkJudge(name, score, identity, passes[kind].tap(depth), prepare, named))
    return judges


def _depths_of(network: Any) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a function that gives a phantom judge's early and late features."""

    def run(inputs_BCHW: Tensor) -> Mapping[str, Tensor]:
        found = network.features(inputs_BCHW)
        return {"early": found.early, "late": found.late}

    return run


def tap_layers(network: Any, layers: Sequence[str]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a function that runs ``network`` once and gives what its sub-modules ``layers`` put out."""
    modules = {layer: network.get_submodule(layer) for layer in layers}

    def run(inputs_BCHW: Tensor) -> Mapping[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def keep(layer: str) -> Callable[[Any, Any, Tensor], None]:
            # cloned, because a layer behind the tap may work in place
            return lambda _module, _inputs, output: outputs.update({layer: output.clone()})

        handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
        try:
            network(inputs_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    return run
