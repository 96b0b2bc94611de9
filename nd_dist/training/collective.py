"""Small collective calls over torch.distributed's world. Every rank makes each of them, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import distributed

from nd_dist.errors import NdDistError

T = TypeVar("T")


def barrier() -> None:
    """Wait for every rank."""
    distributed.barrier()


def gather_objects(value: T) -> list[T]:
    """Return every rank's value in rank order, on every rank."""
    gathered: list[Any] = [None] * distributed.get_world_size()  # Any: torch fills it
    distributed.all_gather_object(gathered, value)
    return gathered


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
