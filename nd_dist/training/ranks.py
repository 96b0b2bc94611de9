"""What the ranks of a training do together: every rank makes each of these calls, in the same order.

Rows of all ranks in one order are what makes a loss over the global batch independent of the number of ranks.

Legend of shape suffixes: B rows of this rank, N rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.nn import functional as F

from nd_dist.errors import NdDistError, RankFailure
from nd_dist.schema import Batch
from nd_dist.world import World

MAX_NAMED = 12

T = TypeVar("T")
Gather = Callable[[torch.Tensor], torch.Tensor]
"""Returns the rows (ranks * B, ...) of all ranks in rank order, given this rank's (B, ...); all ranks call alike."""


class NonFiniteError(NdDistError):
    """A loss or gradient became NaN or infinite; no parameter was changed by that step."""

    exit_code = 1


def on_main(act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0 only and return its result on every rank; where it fails, every rank fails.

    For what must be decided once, such as what a shared file system holds (its caches differ between hosts), and
    what must be written once.
    """
    answer: list[Any] = [None, RankFailure("Rank 0 failed in what it does for all ranks; its log says why.")]
    try:
        if distributed.get_rank() == 0:
            try:
                answer = [act(), None]
            except NdDistError as error:
                answer[1] = error
    finally:  # also where something else was raised here: the others must not wait
        distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return cast(T, answer[0])


def from_main(value: torch.Tensor, world: World, device: torch.device) -> torch.Tensor:
    """Return rank 0's ``value`` on every rank's device; elsewhere it only says shape and precision."""
    if world.size == 1:
        return value.to(device)
    sent = value.to(device).contiguous() if world.is_main else torch.empty_like(value, device=device)
    distributed.broadcast(sent, src=0)
    return sent


def gather_objects(value: T) -> list[T]:
    """Return every rank's value in rank order, on every rank."""
    gathered: list[Any] = [None] * distributed.get_world_size()  # Any: torch fills it
    distributed.all_gather_object(gathered, value)
    return gathered


def identity(rows: torch.Tensor) -> torch.Tensor:
    """Gather in a world of one."""
    return rows


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks in rank order, without a gradient; every rank has equally many."""
    gathered = rows.new_empty((distributed.get_world_size() * len(rows), *rows.shape[1:]))
    distributed.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


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


@dataclass(frozen=True)
class GlobalRows:
    """The rows of a global batch over the ranks: rank r of R holds rows r, r + R, r + 2 R, ...

    All ranks compute equally many rows, so that shapes and collective calls are alike; where the batch ends before,
    the last row of a rank is padding, which belongs to no loss. So any number of ranks trains the same batch.

    Args:
        num: Rows N.
        world: Who this rank is.
        gather: How rows of all ranks are collected.
    """

    num: int
    world: World = field(default_factory=World)
    gather: Gather = identity

    @property
    def per_rank(self) -> int:
        """Rows B of every rank, padding included."""
        return -(-self.num // self.world.size)

    @property
    def num_own(self) -> int:
        """Rows of this rank, without padding."""
        return len(range(self.world.rank, self.num, self.world.size))

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Numbers of this rank's rows in the global batch; those of padding lie behind the last."""
        return self.world.rank + self.world.size * np.arange(self.per_rank)

    def __call__(self, rows_B: torch.Tensor) -> torch.Tensor:
        """Return the rows (N, ...) of all ranks in their order, given this rank's (B, ...)."""
        if self.world.size == 1:
            return rows_B
        gathered = self.gather(rows_B)
        by_rank = gathered.view(self.world.size, self.per_rank, *gathered.shape[1:])
        return by_rank.transpose(0, 1).flatten(0, 1)[: self.num]

    def by_rank(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Return the rows (R, B, ...) as the ranks hold them, given all (N, ...)."""
        padded = self.pad(rows_N, self.per_rank * self.world.size)
        return padded.view(self.per_rank, self.world.size, *padded.shape[1:]).transpose(0, 1)

    def pad(self, rows: torch.Tensor, num: int | None = None) -> torch.Tensor:
        """Return this rank's rows with their padding (``num`` rows: others): rows of zeros behind them."""
        missing = (self.per_rank if num is None else num) - len(rows)
        return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows

    def counts(self, sizes: Sequence[int]) -> list[int]:
        """Return this rank's rows in each of the blocks that make up the global batch; padding is in the last one."""
        size, rank = self.world.size, self.world.rank
        edges = np.cumsum([0, *sizes])
        edges[-1] = size * self.per_rank
        return [int(count) for count in np.diff((edges - rank + size - 1) // size)]

    def scale(self, row: torch.Size) -> float:
        """Return what makes a sum over this rank's values a part of the mean over all rows.

        The average of these parts over ranks, which is what the trainer takes, is that mean.

        Args:
            row: Shape of one row.
        """
        return self.world.size / (self.num * row.numel())


def raise_not_finite(what: str, step: int, batches: Sequence[Batch]) -> NoReturn:
    """Raise on every rank, naming the ranks whose value is not finite and their samples.

    Args:
        what: "loss" or "gradient".
        step: Optimizer step that was not made.
        batches: This rank's batches whose own value is not finite; none: this rank is not to blame.

    Raises:
        NonFiniteError: always.
    """
    reports = gather_objects([{"rank": distributed.get_rank(), **suspects(batch)} for batch in batches])
    bad = [report for own in reports for report in own]
    raise NonFiniteError(
        f"The {what} is not finite at step {step}; training stopped before the optimizer step.",
        where="; ".join(f"rank {r['rank']}: subjects {r['subjects']}, images {r['images']} ({r['why']})" for r in bad),
        found=f"a {what} of NaN or infinity on {sum(map(bool, reports))} of {len(reports)} ranks",
        todo="check these samples (`nd verify` checks the shards); the last checkpoint is intact, "
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
