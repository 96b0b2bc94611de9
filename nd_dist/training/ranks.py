"""Rows of all ranks, in one order: what makes a loss over the global batch independent of the number of ranks.

Legend of shape suffixes: B rows of this rank, N rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Returns the rows (N, ...) of all ranks in rank order, given this rank's (B, ...); every rank calls it alike."""


def identity(rows: torch.Tensor) -> torch.Tensor:
    """Gather in a world of one."""
    return rows


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward needs no communication.

    It is right for losses that every rank computes alike from the gathered rows: each rank's own gradient is then the
    whole gradient of its rows, and times the number of ranks it survives the trainer's average over ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:  # Any: autograd's context has no static type
        """Return the rows of all ranks."""
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this rank's rows, times the number of ranks."""
        start = distributed.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows] * distributed.get_world_size()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather over torch.distributed's world; differentiable for floating-point rows."""
    gathered: torch.Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class GlobalRows:
    """Brings rows of the global batch into the order of their sample ids, the same on every number of ranks.

    Args:
        gather: How rows of all ranks are collected.
        sample_id_B: (B,) int64 ids of this rank's rows, in the order of the rows to gather later.
    """

    def __init__(self, gather: Gather, sample_id_B: torch.Tensor) -> None:
        self._gather = gather
        gathered_N = gather(sample_id_B)
        self._order_N = torch.argsort(gathered_N)
        self.sample_id_N = gathered_N[self._order_N]
        self.own_B = torch.searchsorted(self.sample_id_N, sample_id_B)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (N, ...) rows of all ranks by sample id, given this rank's (B, ...)."""
        return self._gather(rows)[self._order_N]
