"""W ranks as threads of one process: what a gather returns, and what the trainer's average over ranks gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from nd_dist.training.ranks import Gather
from tests.support.waiting import HANG_S

T = TypeVar("T")


class VirtualRanks:
    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[torch.Tensor | None] = [None] * size

    def gather_of(self, rank: int) -> Gather:
        def gather(rows: torch.Tensor) -> torch.Tensor:
            self._slots[rank] = rows.detach()
            self._barrier.wait(HANG_S)
            parts = [slot for slot in self._slots if slot is not None]
            if rows.requires_grad:  # the value once, its gradient once per rank
                parts[rank] = rows * self.size - rows.detach() * (self.size - 1)
            gathered = torch.cat(parts)
            self._barrier.wait(HANG_S)
            return gathered

        return gather

    def run(self, act: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result(HANG_S) for future in [pool.submit(act, rank) for rank in range(self.size)]]
