"""AdamW over the columns that this rank owns, and their checkpoint, which any number of ranks can read.

DeepSpeed trains the other parameters; both follow the same schedule, and this half steps only when that one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import distributed, nn

from nd_dist.checkpoint import write_tensors
from nd_dist.config import TrainingConfig
from nd_dist.errors import CheckpointError
from nd_dist.training.engine.sharded import Columns, ShardedLinear
from nd_dist.training.parameters import adamw, decay_groups
from nd_dist.world import World

_VALUE, _MOMENTS, _STEP = "value", ("exp_avg", "exp_avg_sq"), "step"
_STORED = (_VALUE, *_MOMENTS)


def shard_file(rank: int) -> str:
    """Return the name of the file that holds a rank's columns in a checkpoint folder."""
    return f"columns-rank-{rank:04d}.safetensors"


class ShardOptimizer:
    """Trains sharded layers. Every rank makes the same calls.

    Args:
        layers: Name in the decoder -> layer; may be empty.
        training: Says what AdamW decays.
        world: Who this rank is.
        device: The training device.
    """

    def __init__(
        self, layers: Mapping[str, ShardedLinear], training: TrainingConfig, world: World, device: torch.device
    ) -> None:
        self._world, self._device, self._layers = world, device, tuple(layers.values())
        self._owned: dict[str, tuple[nn.Parameter, Columns]] = {
            f"{name}.{part}": (parameter, layer.columns)
            for name, layer in layers.items()
            for part, parameter in layer.own.items()
        }
        groups = decay_groups(((name, parameter) for name, (parameter, _) in self._owned.items()), training)
        self._optimizer = adamw(groups) if groups else None

    def norm(self) -> float:
        """Return the gradient norm over all layers and ranks (a collective call); 0 without layers."""
        if self._optimizer is None:
            return 0.0
        gradients = [parameter.grad for parameter, _ in self._owned.values() if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).double().square()
        distributed.all_reduce(square)
        return float(square.sqrt())

    def step(self, learning_rate: float, betas: tuple[float, float]) -> None:
        """Update the columns and forget their gradients."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = learning_rate, betas
        self._optimizer.step()
        for layer in self._layers:
            layer.forget()

    def whole(self) -> dict[str, torch.Tensor]:
        """Return every layer's whole parameters on the CPU on rank 0, nothing elsewhere (a collective call)."""
        state: dict[str, torch.Tensor] = {}
        for name, (parameter, columns) in self._owned.items():
            parts = _gather_uneven(parameter.detach(), columns)
            if self._world.is_main:
                state[name] = torch.cat([part.cpu() for part in parts])
        return state

    def save(self, folder: Path) -> None:
        """Write this rank's columns with their moments."""
        if self._optimizer is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, (parameter, _) in self._owned.items():
            moments = self._optimizer.state[parameter]
            tensors[f"{name}/{_VALUE}"] = parameter
            tensors.update({f"{name}/{moment}": moments[moment] for moment in _MOMENTS})
            tensors[_STEP] = moments[_STEP].reshape(1)
        write_tensors(folder / shard_file(self._world.rank), tensors)

    def load(self, folder: Path, saved_size: int) -> None:
        """Read this rank's columns out of the files of the ``saved_size`` ranks that wrote them.

        Raises:
            CheckpointError: a file is missing or holds other layers.
        """
        if self._optimizer is None:
            return
        for name, (parameter, columns) in self._owned.items():
            parts = {part: _read_columns(folder, f"{name}/{part}", columns, saved_size) for part in _STORED}
            values = {
                part: torch.cat(found) if found else torch.empty_like(parameter) for part, found in parts.items()
            }
            parameter.data.copy_(values[_VALUE])
            moments = {part: values[part].to(self._device) for part in _MOMENTS}
            self._optimizer.state[parameter] = {_STEP: _read_step(folder).to(self._device), **moments}


def _read_step(folder: Path) -> torch.Tensor:
    """Return AdamW's step count of a checkpoint; it is the same for all columns."""
    with safe_open(folder / shard_file(0), framework="pt") as stream:
        step: torch.Tensor = stream.get_tensor(_STEP)
    return step.reshape(())


def _read_columns(folder: Path, key: str, columns: Columns, saved_size: int) -> list[torch.Tensor]:
    """Return this rank's columns of one stored tensor, in pieces from the files of those who held them."""
    start, stop = columns.of(columns.world.rank)
    parts: list[torch.Tensor] = []
    for rank in range(saved_size):
        first, last = columns.of(rank, saved_size)
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        with safe_open(folder / shard_file(rank), framework="pt") as stream:
            if key not in stream.keys():  # noqa: SIM118 - a safetensors file is no mapping
                raise CheckpointError("A checkpoint holds other layers.", where=str(folder), expected=key)
            parts.append(stream.get_slice(key)[low - first : high - first])
    return parts


def _gather_uneven(own: torch.Tensor, columns: Columns) -> list[torch.Tensor]:
    """Return every rank's columns; ranks may own different numbers of them."""
    size = columns.world.size
    if size == 1:
        return [own]
    widest = max(columns.widths)
    padded = own.new_zeros((widest, *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)]
    distributed.all_gather(parts, padded)
    return [part[:width] for part, width in zip(parts, columns.widths, strict=True)]
