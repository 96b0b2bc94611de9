"""Ridge regression as a decoder: an affine map from one subject's voxels to every target, in closed form.

A model folder holds the basis of the voxels (directions of the training pictures' voxels) and, in blocks of columns,
what each direction adds to a target: at NSD's size all columns would be 19 GB as one matrix, and are 11 GB so.

Legend of shape suffixes: B samples, V voxels of one subject, R directions, D numbers of a target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from nd_dist.checkpoint import FileRecord, read_tensors
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import read_json, write_json
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec

KIND = "ridge"
FORMAT = 1
CONFIG = "config.json"
BASIS = "basis.safetensors"
BLOCK = 8192
"""Columns in one file."""


def block_name(target: str, index: int) -> str:
    """Return the file name of a block of a target's columns."""
    return f"{target}-{index:05d}.safetensors"


def num_blocks(spec: TargetSpec) -> int:
    """Return how many blocks a target's columns are in."""
    return -(-spec.numel // BLOCK)


class RidgeDecoder(nn.Module):
    """A fitted ridge regression; ``nd_dist.training.ridge`` fits it. Has ``Decoder``'s ``predict``.

    Args:
        folder: The model folder; a target's columns are read when the target is first predicted.

    Raises:
        CheckpointError: the folder is no such model, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        description = read_json(folder / CONFIG)
        if (description.get("kind"), description.get("format")) != (KIND, FORMAT):
            raise CheckpointError(
                "A model folder holds no ridge regression of this format.",
                where=str(folder / CONFIG),
                expected={"kind": KIND, "format": FORMAT},
                found={key: description.get(key) for key in ("kind", "format")},
            )
        self._folder, self._files = folder, {name: FileRecord(**of) for name, of in description["weights"].items()}
        self.targets = tuple(TargetSpec(t["name"], t["role"], tuple(t["shape"])) for t in description["targets"])
        self.num_voxels = {int(subject): int(count) for subject, count in description["num_voxels"].items()}
        self.penalties: dict[str, float] = description["penalties"]
        basis = self._read(BASIS)
        self.register_buffer("mean_V", basis["mean"])
        self.register_buffer("right_VR", basis["right"])
        self._columns: tuple[str, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the decoder of a folder, on the CPU; see the class for errors."""
        return cls(folder)

    @torch.no_grad()
    def predict(
        self, voxels_BV: torch.Tensor, subject: int, seeds: Sequence[int], only: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return predictions (B, *shape), float32, of every target or of those asked for.

        Args:
            voxels_BV: (B, V) z-scored betas of one subject, averaged over repeats as the caller wishes.
            subject: Whose voxels they are.
            seeds: Not looked at: nothing here is random.
            only: Names of the targets.

        Raises:
            ConfigError: the model was fitted to another subject, or voxels do not fit.
            CheckpointError: a file is missing or damaged.
        """
        if subject not in self.num_voxels or voxels_BV.shape[1] != self.num_voxels[subject]:
            raise ConfigError(
                "Subject or voxels do not fit the model.",
                expected=" or ".join(f"subject {own} with {count} voxels" for own, count in self.num_voxels.items()),
                found=f"subject {subject} with {voxels_BV.shape[1]} voxels",
            )
        mean_V, right_VR = self.get_buffer("mean_V"), self.get_buffer("right_VR")
        scores_BR = (voxels_BV.to(mean_V) - mean_V) @ right_VR
        found = {}
        for spec in self.targets:
            if only is None or spec.name in only:
                weight_RD, bias_D = self._columns_of(spec)
                found[spec.name] = torch.addmm(bias_D, scores_BR, weight_RD).view(-1, *spec.shape)
        return found

    def _columns_of(self, spec: TargetSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights (R, D) and bias (D,) of a target, on the device; those of the last one stay in memory."""
        if self._columns is None or self._columns[0] != spec.name:
            self._columns = None  # what was there goes before the next comes
            device = self.get_buffer("mean_V").device
            names = sorted(name for name in self._files if name.startswith(f"{spec.name}-"))
            blocks = [self._read(name) for name in names]
            weight, bias = (torch.cat([block[key] for block in blocks], -1).to(device) for key in ("weight", "bias"))
            self._columns = (spec.name, weight, bias)
        return self._columns[1:]

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        path, wanted = self._folder / name, self._files.get(name)
        tensors = read_tensors(path)
        if (found := FileRecord.of(path)) != wanted:
            raise CheckpointError(
                "A file of a ridge model is not the one that its config.json describes.",
                where=str(path),
                expected=wanted,
                found=found,
                todo="run the training command again; it fits what is missing",
            )
        return tensors


def write_description(
    folder: Path,
    subject: int,
    num_voxels: int,
    targets: Sequence[TargetSpec],
    penalties: Mapping[str, float],
    files: Mapping[str, FileRecord],
) -> None:
    """Write ``config.json`` of a folder whose other files are complete: from then on it is a model."""
    description = {
        "format": FORMAT,
        "kind": KIND,
        "num_voxels": {str(subject): num_voxels},
        "targets": [{"name": s.name, "role": s.role, "shape": list(s.shape)} for s in targets],
        "penalties": dict(penalties),
        "weights": {name: {"num_bytes": of.num_bytes, "sha256": of.sha256} for name, of in sorted(files.items())},
    }
    write_json(folder / CONFIG, description)


def load_decoder(folder: Path) -> Decoder | RidgeDecoder:
    """Return the decoder of a model folder, of whatever kind, on the CPU.

    Raises:
        CheckpointError: the folder is no model, or its weights do not fit its description.
    """
    path = folder / CONFIG
    is_ridge = path.exists() and read_json(path).get("kind") == KIND
    return RidgeDecoder.load(folder) if is_ridge else Decoder.load(folder)
