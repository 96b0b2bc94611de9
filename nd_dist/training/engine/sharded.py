"""Large layers that see few rows: every rank owns some of their output columns, so their gradients never travel.

A voxel encoder has 64 million weights and sees some ten rows of a step. Replicated, its whole gradient is averaged
over ranks in every step. Here the rows travel instead: each rank takes the rows of all ranks through its own columns,
and hands every rank its rows back. The gradient of a column needs nothing but these rows, so weights, gradients and
optimizer state of such a layer exist once in the world, and DeepSpeed does not see them.

Legend of shape suffixes: B rows of this rank, N rows of all ranks, I inputs, O outputs, C outputs owned by this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F

from nd_dist.models.decoder import VOXEL_PREFIX, Decoder
from nd_dist.models.voxels import NormalizedEncoder, RidgeEncoder
from nd_dist.training.ranks import GlobalRows, all_rows, from_main
from nd_dist.world import World

_PER_TOKEN = ("prior", "contrastive", "upsampler", "attention", "feedforward", "asking", "answer", "to_target")
"""Parts of a head whose layers see every token or pixel: far more rows than samples, so replicas are cheaper."""


@dataclass(frozen=True)
class Columns:
    """How the columns of a layer are dealt to the ranks, and the exchange of rows that this needs.

    Every rank has equally many; those of the last ranks may lie behind the layer's and are zero.

    Args:
        world: Who this rank is; all ranks call alike, with equally many rows.
        num: Output columns O of the layer.
    """

    world: World
    num: int

    @property
    def per_rank(self) -> int:
        """Columns C of every rank."""
        return -(-self.num // self.world.size)

    @property
    def own(self) -> tuple[int, int]:
        """The first column of this rank and the one after its last that the layer has."""
        start = min(self.world.rank * self.per_rank, self.num)
        return start, min(start + self.per_rank, self.num)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a parameter or moment, given those of all columns."""
        start, stop = self.own
        return F.pad(whole[start:stop], (0, 0) * (whole.ndim - 1) + (0, self.per_rank - (stop - start)))

    def to_rows(self, columns_NC: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows with all columns (B, O), given this rank's columns of all rows (N, C) by rank."""
        if self.world.size == 1:
            return columns_NC
        rows_BO: torch.Tensor = _Turned.apply(columns_NC, self)  # type: ignore[no-untyped-call]
        return rows_BO[:, : self.num]

    def exchange(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's rows of every subject, given its columns of all rows, in the order of ``GlobalRows``."""
        if self.world.size == 1:
            return parts
        sizes = [len(part) for part in parts]
        rows = GlobalRows(sum(sizes), self.world)
        own_BO = self.to_rows(rows.by_rank(torch.cat(parts)).flatten(0, 1))
        return list(torch.split(own_BO, rows.counts(sizes)))


class _Turned(torch.autograd.Function):
    """This rank's columns of all rows (N, C) -> all columns of this rank's rows (B, ranks * C), and back."""

    @staticmethod
    def forward(ctx: Any, columns_NC: torch.Tensor, columns: Columns) -> torch.Tensor:  # Any: autograd's context
        """Return the rows."""
        ctx.size, width = columns.world.size, columns_NC.shape[1]
        received = torch.empty_like(columns_NC, memory_format=torch.contiguous_format)
        distributed.all_to_all_single(received, columns_NC.contiguous())
        return received.view(ctx.size, -1, width).transpose(0, 1).reshape(-1, ctx.size * width)

    @staticmethod
    def backward(ctx: Any, gradient_BO: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the columns' gradient."""
        width = gradient_BO.shape[1] // ctx.size
        sent = gradient_BO.reshape(-1, ctx.size, width).transpose(0, 1).reshape(-1, width)
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent)
        return received, None


class _AllRows(torch.autograd.Function):
    """Own rows -> rows of all ranks, each of which passes through other columns; backward sums what they say."""

    @staticmethod
    def forward(ctx: Any, rows_BI: torch.Tensor) -> torch.Tensor:  # Any: autograd's context has no static type
        """Return (N, I)."""
        return all_rows(rows_BI)

    @staticmethod
    def backward(ctx: Any, parts_NI: torch.Tensor) -> torch.Tensor:
        """Return (B, I), summed in float32."""
        wide_NI = parts_NI.float()
        own_BI = wide_NI.new_empty(len(wide_NI) // distributed.get_world_size(), wide_NI.shape[1])
        distributed.reduce_scatter_tensor(own_BI, wide_NI)
        return own_BI.to(parts_NI.dtype)


class _Affine(torch.autograd.Function):
    """``x W^T + b`` over the own columns, whose gradients go where they stay."""

    @staticmethod
    def forward(ctx: Any, rows_NI: torch.Tensor, weight_CI: torch.Tensor, layer: OwnColumns) -> torch.Tensor:
        """Return (N, C); the weight is an argument so that autograd comes back here."""
        ctx.save_for_backward(rows_NI)
        ctx.layer = layer
        used = layer.in_precision(rows_NI.dtype)
        return F.linear(rows_NI, used["weight"], used.get("bias"))

    @staticmethod
    def backward(ctx: Any, gradient_NC: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """Return the gradient of the rows, where they have one."""
        (rows_NI,), layer = ctx.saved_tensors, ctx.layer
        layer.collect(gradient_NC / layer.columns.world.size, rows_NI)
        weight_CI = layer.in_precision(gradient_NC.dtype)["weight"]
        return gradient_NC @ weight_CI if ctx.needs_input_grad[0] else None, None, None


class OwnColumns(nn.Module):
    """This rank's columns of a ``nn.Linear``, for rows of all ranks; float32 parameters, hidden from DeepSpeed.

    A rank's loss depends on its own rows, so the gradients of all rows here are those of all ranks' losses; divided by
    the number of ranks they are the gradient of the average loss, as DeepSpeed makes it of the other parameters.
    Gradients keep their memory from step to step: asking the system for it anew costs as much as computing them. A
    network of half precision computes with a copy that lasts until ``forget``.

    Args:
        linear: The layer: whole on rank 0, elsewhere its shape.
        world: Who this rank is.
        device: Where to keep the columns.
    """

    def __init__(self, linear: nn.Linear, world: World, device: torch.device) -> None:
        super().__init__()
        self.columns = Columns(world, linear.out_features)
        self.has_gradient = False
        # in a dictionary, because nn.Module (and so DeepSpeed) registers parameters that are attributes
        self.own: dict[str, nn.Parameter] = {}
        self._copies: dict[str, torch.Tensor] = {}
        for name, parameter in linear.named_parameters():
            whole = from_main(parameter.detach().float(), world, device)
            self.own[name] = nn.Parameter(whole if world.size == 1 else self.columns.part(whole).clone())

    def forward(self, rows_NI: torch.Tensor) -> torch.Tensor:
        """Return (N, C)."""
        columns_NC: torch.Tensor = _Affine.apply(rows_NI, self.own["weight"], self)  # type: ignore[no-untyped-call]
        return columns_NC

    def in_precision(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the parameters in a precision; copies last as long as the parameters stay what they are."""
        if dtype == torch.float32:
            return dict(self.own)
        if not self._copies:
            self._copies = {name: value.detach().to(dtype) for name, value in self.own.items()}
        return self._copies

    def collect(self, gradient_NC: torch.Tensor, rows_NI: torch.Tensor) -> None:
        """Add to the gradients of the own columns; the first time after ``forget`` overwrite them."""
        for parameter in self.own.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        weight, bias = self.own["weight"].grad, self.own["bias"].grad if "bias" in self.own else None
        assert weight is not None
        if gradient_NC.dtype == weight.dtype:
            torch.addmm(weight, gradient_NC.T, rows_NI, beta=float(self.has_gradient), out=weight)
        else:
            _put(weight, gradient_NC.T @ rows_NI, self.has_gradient)
        if bias is not None:
            _put(bias, gradient_NC.sum(dim=0), self.has_gradient)
        self.has_gradient = True

    def forget(self) -> None:
        """Note that the parameters were updated: the next gradients overwrite these, and copies are made anew."""
        self.has_gradient = False
        self._copies = {}


class ShardedLinear(OwnColumns):
    """Takes the place of a ``nn.Linear`` in training: this rank's rows in, this rank's rows out."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (..., O) for this rank's (..., I); every rank calls it with equally many rows."""
        rows_NI = rows.flatten(0, -2)
        if self.columns.world.size > 1:
            rows_NI = _AllRows.apply(rows_NI)  # type: ignore[no-untyped-call]
        return self.columns.to_rows(super().forward(rows_NI)).view(*rows.shape[:-1], self.columns.num)


def _put(target: torch.Tensor, values: torch.Tensor, is_added: bool) -> None:
    """Add values of any precision to a tensor, or copy them into it."""
    if is_added:
        target.add_(values)
    else:
        target.copy_(values)


def shard_large_layers(decoder: Decoder, rows: int, world: World, device: torch.device) -> dict[str, OwnColumns]:
    """Replace every layer of the decoder whose rows are lighter than its gradient; return the replacements by name.

    Which layers these are depends on the global batch alone, so it is the same on any number of ranks. The voxel
    encoders of all subjects are divided or none: their rows travel together.

    Args:
        decoder: Changed in place; whole on rank 0.
        rows: Rows of the global micro-batch.
        world: Who this rank is.
        device: The training device.
    """
    chosen: dict[str, OwnColumns] = {}
    hidden, share = decoder.config.hidden_size, rows / len(decoder.num_voxels)
    decoder.encodes_all_rows = pays(sum(decoder.num_voxels.values()) / len(decoder.num_voxels), hidden, share)
    for name, module in list(decoder.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, RidgeEncoder | NormalizedEncoder) and decoder.encodes_all_rows:
            module.exchange = Columns(world, hidden).exchange
        elif isinstance(module, nn.Linear) and _is_chosen(name, module, decoder, rows):
            kind = OwnColumns if name.startswith(VOXEL_PREFIX) else ShardedLinear
            chosen[name] = kind(module, world, device)
            setattr(decoder.get_submodule(parent), child, chosen[name])
    return chosen


def share_weights(network: nn.Module, world: World, device: torch.device) -> None:
    """Give every rank rank 0's parameters and buffers that are not divided; elsewhere they were shapes only."""
    if world.size == 1:
        return
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(from_main(parameter.detach(), world, device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, from_main(buffer, world, device))


def _is_chosen(name: str, linear: nn.Linear, decoder: Decoder, rows: int) -> bool:
    """Whether a linear layer is divided; one that sees more than one row a sample is not."""
    if name.startswith(VOXEL_PREFIX):
        return decoder.encodes_all_rows
    return not set(name.split(".")) & set(_PER_TOKEN) and pays(linear.in_features, linear.out_features, rows)


def pays(inputs: float, outputs: int, rows: float) -> bool:
    """Whether all rows, there and back, are fewer numbers than twice the gradient (an all-reduce sends it twice)."""
    return rows * (3 * inputs + 2 * outputs) < 2 * inputs * outputs
