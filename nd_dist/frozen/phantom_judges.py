"""Judges of the phantom: small classifiers whose features stand in for the metric networks (AlexNet, Inception, ...).

Four architectures that differ from the guidance CLIP and from each other; each names the objects and the place of a
64x64 picture. Whoever scores a reconstruction takes their features at two depths. Training is not done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nd_dist.errors import CheckpointError
from nd_dist.files import atomic_path, read_json, write_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class JudgeFeatures:
    """What a judge makes of B pictures.

    Args:
        early: (B, D1) features at a quarter of the depth's resolution: layout, colour, texture.
        late: (B, 128) features before the classifiers: what is in the picture.
    """

    early: torch.Tensor
    late: torch.Tensor


class JudgeNetwork(nn.Module):
    """A classifier of objects and places.

    Args:
        kind: One of ``JUDGE_KINDS``.
        num_objects: Number of object classes.
        num_places: Number of place classes.
    """

    def __init__(self, kind: str, num_objects: int, num_places: int) -> None:
        super().__init__()
        self.config = {"kind": kind, "num_objects": num_objects, "num_places": num_places}
        self.early, self.late = _BUILDERS[kind]()
        self.objects = nn.Linear(LATE_WIDTH, num_objects)
        self.places = nn.Linear(LATE_WIDTH, num_places)

    def features(self, pixels_BCHW: torch.Tensor) -> JudgeFeatures:
        """Return the features of pictures.

        Args:
            pixels_BCHW: (B, 3, 64, 64) in [0, 1].
        """
        early_BCHW = self.early(2 * pixels_BCHW - 1)
        return JudgeFeatures(early_BCHW.flatten(1), self.late(early_BCHW))

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of objects (B, num_objects) and places (B, num_places); pixels as for ``features``."""
        late_BD = self.features(pixels_BCHW).late
        return self.objects(late_BD), self.places(late_BD)

    @torch.no_grad()
    def named(self, late_BD: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of objects (B, num_objects) on the CPU, from late features (B, 128)."""
        logits_BO: torch.Tensor = self.objects(late_BD.to(self.objects.weight))
        return logits_BO.softmax(dim=1).cpu()

    def save(self, folder: Path) -> None:
        """Write the weights (in their own dtype) and the config to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / WEIGHTS) as part:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, part)
        write_json(folder / CONFIG, self.config)

    @classmethod
    def load(cls, folder: Path) -> JudgeNetwork:
        """Return the judge in a folder, in float32 and evaluation mode.

        Raises:
            CheckpointError: files are missing or belong to another architecture.
        """
        if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
            raise CheckpointError("A judge is missing.", where=str(folder), expected=f"{WEIGHTS}, {CONFIG}")
        config = read_json(folder / CONFIG)
        judge = cls(config["kind"], config["num_objects"], config["num_places"])
        state = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        if set(state) != set(judge.state_dict()):
            raise CheckpointError(
                "A judge's weights do not fit its config.",
                where=str(folder),
                expected=sorted(set(judge.state_dict()) - set(state))[:3],
                found=sorted(set(state) - set(judge.state_dict()))[:3],
            )
        judge.load_state_dict(state)
        return judge.eval().requires_grad_(False)


def load_judges(folder: Path) -> dict[str, JudgeNetwork]:
    """Return every judge of a folder, kind -> judge, in the order of ``JUDGE_KINDS``.

    Raises:
        CheckpointError: one is missing.
    """
    return {kind: JudgeNetwork.load(folder / kind) for kind in JUDGE_KINDS}


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    """Two group-normalised convolutions with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        again = [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.body = nn.Sequential(*layer, *again)

    def forward(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """Return maps of the same shape."""
        return torch.add(maps_BCHW, self.body(maps_BCHW))


class _Depthwise(nn.Module):
    """A wide depthwise convolution and a pointwise perceptron with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.GELU(),
            nn.Conv2d(3 * width, width, 1),
        )

    def forward(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """Return maps of the same shape."""
        return torch.add(maps_BCHW, self.body(maps_BCHW))


class _Mixer(nn.Module):
    """A perceptron over places, then one over channels, each with a skip."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_places = nn.Sequential(nn.Linear(places, places), nn.GELU(), nn.Linear(places, places))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """Return maps of the same shape."""
        tokens_BLD = maps_BCHW.flatten(2).transpose(1, 2)
        tokens_BLD = tokens_BLD + self.over_places(self.norms[0](tokens_BLD).transpose(1, 2)).transpose(1, 2)
        tokens_BLD = tokens_BLD + self.over_channels(self.norms[1](tokens_BLD))
        mixed_BCHW: torch.Tensor = tokens_BLD.transpose(1, 2).reshape(maps_BCHW.shape)
        return mixed_BCHW


def _pooled(width: int) -> list[nn.Module]:
    """Average and maximum are both needed: places fill the picture, objects do not."""
    return [_AverageAndMaximum(), nn.Linear(2 * width, LATE_WIDTH), nn.GELU()]


class _AverageAndMaximum(nn.Module):
    """Pools maps over the picture."""

    def forward(self, maps_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, 2 C)."""
        return torch.cat([maps_BCHW.mean((2, 3)), maps_BCHW.amax((2, 3))], dim=1)


def _plain() -> tuple[nn.Module, nn.Module]:
    early = nn.Sequential(_conv(3, 32, 2, 5), _conv(32, 32, 2))
    late = [_conv(32, 64), _conv(64, 96, 2), _conv(96, 128), _conv(128, 128)]
    return early, nn.Sequential(*late, *_pooled(128))


def _residual() -> tuple[nn.Module, nn.Module]:
    early = nn.Sequential(nn.Conv2d(3, 40, 4, 4), _Residual(40))
    late = [nn.Conv2d(40, 112, 2, 2), _Residual(112), _Residual(112)]
    return early, nn.Sequential(*late, *_pooled(112))


def _depthwise() -> tuple[nn.Module, nn.Module]:
    early = nn.Sequential(nn.Conv2d(3, 48, 6, 4, 1), nn.GroupNorm(1, 48), _Depthwise(48))
    late = [nn.Conv2d(48, 128, 2, 2), _Depthwise(128), _Depthwise(128), _Depthwise(128)]
    return early, nn.Sequential(*late, *_pooled(128))


def _mixer() -> tuple[nn.Module, nn.Module]:
    early = nn.Sequential(_conv(3, 32, 2), nn.Conv2d(32, 96, 4, 4), _Mixer(64, 96))
    return early, nn.Sequential(*[_Mixer(64, 96) for _ in range(4)], *_pooled(96))


LATE_WIDTH = 128
_BUILDERS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "plain": _plain,
    "residual": _residual,
    "depthwise": _depthwise,
    "mixer": _mixer,
}
JUDGE_KINDS = tuple(_BUILDERS)
