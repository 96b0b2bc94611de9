"""Large layers that see few rows: every rank owns some of their output columns, so their gradients never travel.

A voxel encoder has 64 million weights and sees some ten rows of a step. Replicated, its whole gradient is averaged
over ranks in every step. Here the rows travel instead: each rank takes the rows of all ranks through its own columns,
and hands every rank its rows back. The gradient of a column needs nothing but these rows, so weights, gradients and
optimizer state of such a layer exist once in the world, and DeepSpeed does not see them.

Legend of shape suffixes: B rows of this rank, N rows of all ranks, I inputs, O outputs, C outputs owned by this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

from nd_dist.models.decoder import VOXEL_PREFIX
from nd_dist.training.ranks import all_rows
from nd_dist.world import World

_PER_TOKEN = ("prior", "contrastive", "upsampler")
"""Parts of a head whose layers see every token or pixel: far more rows than samples, so replicas are cheaper."""


@dataclass(frozen=True)
class Columns:
    """How the columns of a layer are dealt to the ranks, and the collective calls that this needs.

    Args:
        world: Who this rank is; all ranks call alike.
        num: Output columns O of the layer.
    """

    world: World
    num: int

    def of(self, rank: int, size: int | None = None) -> tuple[int, int]:
        """Return the first column of a rank and the one after its last (in a world of ``size``, none: this one)."""
        size = self.world.size if size is None else size
        return self.num * rank // size, self.num * (rank + 1) // size

    @property
    def widths(self) -> list[int]:
        """Number of columns of every rank."""
        return [stop - start for start, stop in map(self.of, range(self.world.size))]

    def to_rows(self, columns_NC: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows with all columns (B, O), given all rows with this rank's columns (N, C)."""
        if self.world.size == 1:
            return columns_NC
        rows, own = len(columns_NC) // self.world.size, columns_NC.shape[1]
        received = columns_NC.new_empty(rows * self.num)
        sizes = [rows * width for width in self.widths]
        distributed.all_to_all_single(received, columns_NC.reshape(-1), sizes, [rows * own] * self.world.size)
        return torch.cat([part.view(rows, -1) for part in torch.split(received, sizes)], dim=1)

    def to_columns(self, rows_BO: torch.Tensor) -> torch.Tensor:
        """Return all rows with this rank's columns (N, C), given this rank's rows with all columns (B, O)."""
        if self.world.size == 1:
            return rows_BO
        rows, own = len(rows_BO), self.widths[self.world.rank]
        sent = torch.cat([part.reshape(-1) for part in torch.split(rows_BO, self.widths, dim=1)])
        received = rows_BO.new_empty(rows * self.world.size * own)
        sizes = [rows * width for width in self.widths]
        distributed.all_to_all_single(received, sent, [rows * own] * self.world.size, sizes)
        return received.view(-1, own)

    def own_sum(self, parts_NI: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows (B, I) of the sum over ranks, in float32."""
        wide_NI = parts_NI.float()
        if self.world.size == 1:
            return wide_NI
        distributed.all_reduce(wide_NI)
        rows = len(wide_NI) // self.world.size
        return wide_NI[self.world.rank * rows : (self.world.rank + 1) * rows]


class _ShardedAffine(torch.autograd.Function):
    """``x W^T + b`` with columns of W and b on different ranks.

    A rank's loss depends on its own rows, so the gradients of all rows here are those of all ranks' losses; divided by
    the number of ranks they are the gradient of the average loss, as DeepSpeed makes it of the other parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,  # Any: autograd's context has no static type
        rows_BI: torch.Tensor,
        weight_CI: torch.Tensor,
        layer: ShardedLinear,
    ) -> torch.Tensor:
        """Return (B, O); the weight is an argument so that autograd comes back here."""
        all_NI = rows_BI if layer.columns.world.size == 1 else all_rows(rows_BI)
        ctx.save_for_backward(all_NI)
        ctx.layer = layer
        bias = layer.own.get("bias")
        bias_C = None if bias is None else bias.to(all_NI.dtype)
        return layer.columns.to_rows(F.linear(all_NI, weight_CI.to(all_NI.dtype), bias_C))

    @staticmethod
    def backward(ctx: Any, gradient_BO: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """Return the gradient of this rank's rows; those of the columns go where they stay."""
        (all_NI,) = ctx.saved_tensors
        layer: ShardedLinear = ctx.layer
        gradient_NC = layer.columns.to_columns(gradient_BO)
        rows_gradient = None
        if ctx.needs_input_grad[0]:
            parts_NI = gradient_NC @ layer.own["weight"].to(gradient_NC.dtype)
            rows_gradient = layer.columns.own_sum(parts_NI).to(gradient_BO.dtype)
        layer.collect(gradient_NC / layer.columns.world.size, all_NI)
        return rows_gradient, None, None


class ShardedLinear(nn.Module):
    """Takes the place of a ``nn.Linear`` in training; its parameters are float32 and hidden from DeepSpeed.

    Gradients keep their memory from step to step: asking the system for it anew costs as much as computing them.

    Args:
        linear: The layer, whole and equal on every rank.
        world: Who this rank is.
        device: Where to keep the columns.
    """

    def __init__(self, linear: nn.Linear, world: World, device: torch.device) -> None:
        super().__init__()
        self.columns = Columns(world, linear.out_features)
        self.has_gradient = False
        start, stop = self.columns.of(world.rank)
        whole = {name: parameter.detach() for name, parameter in linear.named_parameters()}
        # in a dictionary, because nn.Module (and so DeepSpeed) registers parameters that are attributes
        self.own = {
            name: nn.Parameter(value[start:stop].to(device=device, dtype=torch.float32, copy=world.size > 1))
            for name, value in whole.items()
        }

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (..., O) for this rank's (..., I); every rank calls it with equally many rows."""
        flat_BI = rows.flatten(0, -2)
        outputs: torch.Tensor = _ShardedAffine.apply(flat_BI, self.own["weight"], self)  # type: ignore[no-untyped-call]
        return outputs.view(*rows.shape[:-1], self.columns.num)

    def collect(self, gradient_NC: torch.Tensor, all_NI: torch.Tensor) -> None:
        """Add to the gradients of the own columns; the first time after ``forget`` overwrite them."""
        for parameter in self.own.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        weight, bias = self.own["weight"].grad, self.own["bias"].grad if "bias" in self.own else None
        assert weight is not None
        if gradient_NC.dtype == weight.dtype:
            torch.addmm(weight, gradient_NC.T, all_NI, beta=float(self.has_gradient), out=weight)
        else:
            _put(weight, gradient_NC.T @ all_NI, self.has_gradient)
        if bias is not None:
            _put(bias, gradient_NC.sum(dim=0), self.has_gradient)
        self.has_gradient = True

    def forget(self) -> None:
        """Let the next gradients overwrite these."""
        self.has_gradient = False


def _put(target: torch.Tensor, values: torch.Tensor, is_added: bool) -> None:
    """Add values of any precision to a tensor, or copy them into it."""
    if is_added:
        target.add_(values)
    else:
        target.copy_(values)


def shard_large_layers(
    decoder: nn.Module, rows: int, rows_per_subject: int, world: World, device: torch.device
) -> dict[str, ShardedLinear]:
    """Replace every layer of the decoder whose rows are lighter than its gradient; return the replacements by name.

    Which layers these are depends on the global batch alone, so it is the same on any number of ranks.

    Args:
        decoder: Changed in place; whole and equal on every rank.
        rows: Rows of the global micro-batch.
        rows_per_subject: Those of one subject.
        world: Who this rank is.
        device: The training device.
    """
    chosen: dict[str, ShardedLinear] = {}
    for name, linear in list(_row_layers(decoder)):
        count = rows_per_subject if name.startswith(VOXEL_PREFIX) else rows
        if pays(linear.in_features, linear.out_features, count):
            parent, _, child = name.rpartition(".")
            chosen[name] = ShardedLinear(linear, world, device)
            setattr(decoder.get_submodule(parent), child, chosen[name])
    return chosen


def _row_layers(decoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers that see one row per sample."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear) and not set(name.split(".")) & set(_PER_TOKEN):
            yield name, module


def pays(inputs: int, outputs: int, rows: float) -> bool:
    """Whether all rows, there and back, are fewer numbers than twice the gradient (an all-reduce sends it twice)."""
    return rows * (3 * inputs + 2 * outputs) < 2 * inputs * outputs
