"""Rows of a batch in chunks that fit into memory: from free memory, remembered, and never a crash without advice.

On an accelerator one row is run first and its peak measured; free memory then says how many fit. Where the measure was
too hopeful chunks are halved, and where not even one row fits a rescue (gradient checkpointing) is tried once.
On the CPU nothing says when memory is full; there chunks are small because those that leave the caches are slower.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nd_dist.errors import NdDistError

CPU_UNET_BYTES = 4 << 20
CPU_VAE_BYTES = 16 << 20
"""Largest layer of a chunk on the CPU. Stable Diffusion's sizes give chunks of one sample."""
USED_SHARE = 0.85
"""Share of free memory that chunks are planned for: workspaces and fragments take the rest."""

_SAYS_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_\w+")
"""What torch, cuBLAS and cuDNN say where a workspace or a handle does not fit any more."""

Rows = Callable[[slice], tuple[torch.Tensor, ...]]


class OutOfMemory(NdDistError):
    """Not even one sample fits into the accelerator's memory."""


def full_memory(error: BaseException) -> OutOfMemory:
    """Return the error that tells a user what to do about full memory, from the one that a library raised."""
    return OutOfMemory(
        "The accelerator's memory is full.",
        found=str(error).splitlines()[0],
        todo="nd train: more ranks, training.dtype=bfloat16, training.zero_stage=2 or 3 (docs/training.md: which GPU "
        "can train what); nd evaluate, nd pack: sampler.dtype and frozen.dtype=bfloat16, one rank per GPU; or free "
        "the GPU of other programs",
    )


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error says that the accelerator's memory is full, whichever library met it."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and _SAYS_MEMORY.search(str(error)) is not None


class MemoryMeter(Protocol):
    """What chunks need to know of a device's memory."""

    def free_bytes(self) -> int:
        """Return how much a computation may take."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Run something and return how much it took at most, beyond what was taken before."""
        ...


@dataclass(frozen=True)
class CudaMeter:
    """Memory of a CUDA device, as its driver and torch's allocator see it.

    Args:
        device: The device.
    """

    device: torch.device

    def free_bytes(self) -> int:
        """Return the driver's free memory and what torch holds without using it, at most this process's share."""
        free, total = torch.cuda.mem_get_info(self.device)
        taken = torch.cuda.memory_allocated(self.device)
        share = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        return min(int(free) + torch.cuda.memory_reserved(self.device), share) - taken

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Run something and return the allocator's peak during it, less what was allocated before."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return int(torch.cuda.max_memory_allocated(self.device)) - int(before)


def cpu_rows(largest_layer: int, layer_bytes: int) -> int:
    """Return how many rows a chunk has on the CPU.

    Args:
        largest_layer: Values of one row in the network's largest layer.
        layer_bytes: Most bytes of that layer in one chunk.
    """
    return max(1, layer_bytes // (4 * largest_layer))


def _no_rescue() -> bool:
    return False


class AdaptiveChunks:
    """Runs a row-wise computation in equal chunks that fit into memory.

    Rows must not depend on each other: then chunks change results by float rounding only.

    Args:
        what: The computation, for the error message.
        limit: Most rows in one chunk, tried first; none lets ``meter`` decide.
        meter: The device's memory; needed where there is no limit.
        rescue: Called when one row alone does not fit: makes the computation smaller and returns whether it did.
        most: Most rows that the kernels take, whatever the memory.
    """

    def __init__(
        self,
        what: str,
        limit: int | None,
        meter: MemoryMeter | None = None,
        rescue: Callable[[], bool] = _no_rescue,
        most: int = sys.maxsize,
    ) -> None:
        assert limit is None or limit >= 1, "a chunk has at least one row"
        assert limit is not None or meter is not None, "without a limit a meter finds one"
        self._what, self._meter, self._rescue, self._most = what, meter, rescue, most
        self.limit = None if limit is None else min(limit, most)

    def run(self, num_rows: int, compute: Rows) -> tuple[torch.Tensor, ...]:
        """Return ``compute``'s tensors for rows 0..num_rows-1, joined along dimension 0.

        Raises:
            OutOfMemory: one row alone does not fit.
        """
        if self.limit is None and num_rows > 1:
            self.limit = self._measured_limit(compute)
        parts: list[tuple[torch.Tensor, ...]] = []
        start = 0
        while start < num_rows:
            chunks_left = -(-(num_rows - start) // (self.limit or 1))
            stop = start + -(-(num_rows - start) // chunks_left)
            if (made := self._tried(slice(start, stop), compute)) is not None:
                parts.append(made)
                start = stop
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _measured_limit(self, compute: Rows) -> int:
        """Return how many rows fit, from the peak of one. Its result is dropped, so that every call chunks alike."""
        assert self._meter is not None
        free = self._meter.free_bytes()

        def one() -> None:
            while self._tried(slice(0, 1), compute) is None:
                pass

        return min(self._most, max(1, int(USED_SHARE * free) // max(1, self._meter.peak_bytes(one))))

    def _tried(self, rows: slice, compute: Rows) -> tuple[torch.Tensor, ...] | None:
        """Return a chunk's tensors, or none where it did not fit and the next try will be smaller.

        Raises:
            OutOfMemory: it was one row, and no rescue is left.
        """
        size = rows.stop - rows.start
        try:
            return compute(rows)
        except (RuntimeError, OutOfMemory) as error:  # the latter from chunks within this one
            if not is_memory_error(error):
                raise
            if size == 1 and not self._rescue():
                raise self._advice() from error
            if size > 1:
                self.limit = size // 2
        torch.cuda.empty_cache()  # outside the except clause, whose traceback keeps the failed chunk's tensors
        return None

    def _advice(self) -> OutOfMemory:
        return OutOfMemory(
            f"The accelerator has too little memory for one sample ({self._what}), even with gradient checkpointing.",
            expected="about 5 GiB free for Stable Diffusion 1.4 in bfloat16, 10 GiB in float32",
            todo="set sampler.dtype=bfloat16 (nd pack: frozen.dtype=bfloat16), run one rank per GPU, or free the GPU "
            "of other programs",
        )
