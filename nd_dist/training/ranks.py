"""What the ranks of a training do together: every rank makes each of these calls, in the same order.

Rows of all ranks in one order are what makes a loss over the global batch independent of the number of ranks.

Legend of shape suffixes: B rows of this rank, N rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
from torch import distributed

from nd_dist.errors import NdDistError
from nd_dist.schema import Batch

MAX_NAMED = 12

T = TypeVar("T")
Gather = Callable[[torch.Tensor], torch.Tensor]
"""Returns the rows (N, ...) of all ranks in rank order, given this rank's (B, ...); every rank calls it alike."""


class NonFiniteError(NdDistError):
    """A loss or gradient became NaN or infinite; no parameter was changed by that step."""

    exit_code = 1


def on_main(act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0 only and return its result on every rank; its error is raised on every rank.

    For what must be decided once, such as what a shared file system holds (its caches differ between hosts), and
    what must be written once.
    """
    result: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            result[0] = act()
        except NdDistError as error:
            result[1] = error
    distributed.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return cast(T, result[0])


def gather_objects(value: T) -> list[T]:
    """Return every rank's value in rank order, on every rank."""
    gathered: list[Any] = [None] * distributed.get_world_size()  # Any: torch fills it
    distributed.all_gather_object(gathered, value)
    return gathered


def identity(rows: torch.Tensor) -> torch.Tensor:
    """Gather in a world of one."""
    return rows


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows (N, ...) of all ranks in rank order, without a gradient; every rank has equally many."""
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward needs no communication.

    It is right for losses that every rank computes alike from the gathered rows: each rank's own gradient is then the
    whole gradient of its rows, and times the number of ranks it survives the trainer's average over ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:  # Any: autograd's context has no static type
        """Return the rows of all ranks."""
        ctx.num_rows = len(rows)
        return all_rows(rows)

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


def raise_not_finite(what: str, step: int, batch: Batch, is_bad: bool) -> NoReturn:
    """Raise on every rank, naming the ranks whose value is not finite and their samples.

    Args:
        what: "loss" or "gradient".
        step: Optimizer step that was not made.
        batch: This rank's batch.
        is_bad: Whether this rank's own value is not finite.

    Raises:
        NonFiniteError: always.
    """
    reports = gather_objects({"rank": distributed.get_rank(), **suspects(batch)} if is_bad else None)
    bad = [report for report in reports if report is not None]
    raise NonFiniteError(
        f"The {what} is not finite at step {step}; training stopped before the optimizer step.",
        where="; ".join(f"rank {r['rank']}: subjects {r['subjects']}, images {r['images']} ({r['why']})" for r in bad),
        found=f"a {what} of NaN or infinity on {len(bad)} of {len(reports)} ranks",
        todo="look at these samples (`nd verify` checks the shards); the last checkpoint is good, "
        "the same command continues from it, with a lower training.learning_rate or training.gradient_clip set if "
        "the samples are fine",
    )


def suspects(batch: Batch) -> dict[str, Any]:
    """Return subjects and image ids of the rows whose voxels or targets are not finite; of all rows where none is."""
    finite = np.ones(len(batch), dtype=bool)
    if batch.voxels:
        finite = torch.cat([torch.isfinite(v).flatten(1).all(dim=1) for v in batch.voxels.values()]).cpu().numpy()
    for target in batch.targets.values():
        finite &= torch.isfinite(target).flatten(1).all(dim=1).cpu().numpy()
    rows = ~finite if not finite.all() else np.ones(len(batch), dtype=bool)
    images = sorted({int(image) for image in batch.image_id[rows]})
    return {
        "subjects": sorted({int(subject) for subject in batch.subject[rows]}),
        "images": images[:MAX_NAMED] + (["..."] if len(images) > MAX_NAMED else []),
        "why": "inputs are finite" if finite.all() else "their voxels or targets are not finite",
    }
