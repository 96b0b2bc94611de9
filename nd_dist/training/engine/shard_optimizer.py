"""AdamW over the columns that this rank owns, and their checkpoint, which any number of ranks can read.

DeepSpeed trains the other parameters; both follow the same schedule, and this half steps only when that one did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import distributed, nn
from torch.nn import functional as F

from nd_dist.config import TrainingConfig
from nd_dist.errors import CheckpointError
from nd_dist.training.engine.sharded import Columns, OwnColumns
from nd_dist.training.parameters import adamw, parameter_groups
from nd_dist.training.ranks import all_rows
from nd_dist.world import World

_VALUE, _MOMENTS, _STEP = "value", ("exp_avg", "exp_avg_sq"), "step"
_STORED = (_VALUE, *_MOMENTS)


def shard_file(rank: int) -> str:
    """Return the name of the file that holds a rank's columns in a checkpoint folder."""
    return f"columns-rank-{rank:04d}.safetensors"


class ShardOptimizer:
    """Trains divided layers. Every rank makes the same calls.

    Args:
        layers: Name in the decoder -> layer; may be empty.
        training: Says what AdamW decays.
        world: Who this rank is.
        device: The training device.
    """

    def __init__(
        self, layers: Mapping[str, OwnColumns], training: TrainingConfig, world: World, device: torch.device
    ) -> None:
        self._world, self._device, self._layers = world, device, tuple(layers.values())
        self._owned: dict[str, tuple[nn.Parameter, Columns]] = {
            f"{name}.{part}": (parameter, layer.columns)
            for name, layer in layers.items()
            for part, parameter in layer.own.items()
        }
        groups = parameter_groups(((name, parameter) for name, (parameter, _) in self._owned.items()), training)
        self.optimizers = [adamw(groups)] if groups else []

    def norm(self) -> torch.Tensor:
        """Return the gradient norm over all layers and ranks, on the device (a collective call); 0 without layers."""
        gradients = [parameter.grad for parameter, _ in self._owned.values() if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square().to(self._device)
        if self._owned and self._world.size > 1:
            distributed.all_reduce(square)
        return square.sqrt()

    def step(self) -> None:
        """Update the columns and forget their gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        for layer in self._layers:
            layer.forget()

    def whole(self) -> dict[str, torch.Tensor]:
        """Return every layer's whole parameters on the CPU on rank 0, nothing elsewhere (a collective call)."""
        state: dict[str, torch.Tensor] = {}
        for name, (parameter, columns) in self._owned.items():
            whole = all_rows(parameter.detach()) if self._world.size > 1 else parameter.detach()
            if self._world.is_main:
                state[name] = whole[: columns.num].to("cpu", copy=True)
        return state

    def state(self) -> dict[str, torch.Tensor]:
        """Return this rank's columns with their moments, as they lie in its file."""
        tensors: dict[str, torch.Tensor] = {}
        for optimizer in self.optimizers:
            for name, (parameter, columns) in self._owned.items():
                state, num = optimizer.state[parameter], columns.own[1] - columns.own[0]
                parts = {_VALUE: parameter.detach(), **{moment: state[moment] for moment in _MOMENTS}}
                tensors.update({f"{name}/{part}": value[:num] for part, value in parts.items()})
                tensors[_STEP] = state[_STEP].reshape(1)
        return tensors

    def load(self, folder: Path, saved_size: int) -> None:
        """Read this rank's columns out of the files of the ``saved_size`` ranks that wrote them.

        Raises:
            CheckpointError: a file is missing or holds other layers.
        """
        if not self._owned:
            return
        with ExitStack() as stack:
            paths = [folder / shard_file(rank) for rank in range(saved_size)]
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            step = files[0].get_tensor(_STEP).reshape(())
            for name, (parameter, columns) in self._owned.items():
                value, *moments = (_columns_of(files, f"{name}/{part}", columns) for part in _STORED)
                parameter.data.copy_(value)
                state = {part: moment.to(self._device) for part, moment in zip(_MOMENTS, moments, strict=True)}
                self.optimizers[0].state[parameter] = {_STEP: step.to(self._device, copy=True), **state}
        for layer in self._layers:
            layer.forget()


def _columns_of(files: Sequence[Any], key: str, columns: Columns) -> torch.Tensor:
    """Return this rank's columns of one stored tensor, in pieces from the files of those who held them."""
    start, stop = columns.own
    pieces: list[torch.Tensor] = []
    first = 0
    for file in files:
        if key not in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            raise CheckpointError("A checkpoint holds other layers.", expected=key)
        stored = file.get_slice(key)
        num = stored.get_shape()[0]
        low, high = (min(max(edge - first, 0), num) for edge in (start, stop))
        if low < high or not pieces:
            pieces.append(stored[low:high])
        first += num
    found = torch.cat(pieces)
    return F.pad(found, (0, 0) * (found.ndim - 1) + (0, columns.per_rank - len(found)))
