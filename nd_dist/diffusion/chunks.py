"""Rows of a batch in chunks that fit into memory: found by trying, remembered, and never a crash without advice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nd_dist.errors import NdDistError

UNLIMITED = 1 << 20
"""Rows of a chunk where the accelerator itself says when it is full."""
CPU_UNET_BYTES = 4 << 20
CPU_VAE_BYTES = 16 << 20
"""Largest layer of a chunk on the CPU: there chunks that leave the caches are slower, and nothing says when memory is
full. Stable Diffusion's sizes give chunks of one sample."""


def first_rows(device: torch.device, largest_layer: int, cpu_bytes: int) -> int:
    """Return how many rows a chunk has to begin with.

    Args:
        device: Where it runs.
        largest_layer: Values of one row in the network's largest layer.
        cpu_bytes: Most bytes of that layer in one chunk on the CPU.
    """
    if device.type != "cpu":
        return UNLIMITED
    return max(1, cpu_bytes // (4 * largest_layer))


class OutOfMemory(NdDistError):
    """Not even one sample fits into the accelerator's memory."""


class AdaptiveChunks:
    """Runs a row-wise computation in equal chunks, and halves them when the accelerator has no memory left.

    Rows must not depend on each other: then chunks change results by float rounding only.

    Args:
        what: The computation, for the error message.
        limit: Most rows in one chunk, to begin with.
    """

    def __init__(self, what: str, limit: int) -> None:
        assert limit >= 1, "a chunk has at least one row"
        self._what, self.limit = what, limit

    def run(self, num_rows: int, compute: Callable[[slice], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Return ``compute``'s tensors for rows 0..num_rows-1, joined along dimension 0.

        Raises:
            OutOfMemory: one row alone does not fit.
        """
        parts: list[tuple[torch.Tensor, ...]] = []
        start = 0
        while start < num_rows:
            chunks_left = -(-(num_rows - start) // self.limit)
            stop = start + -(-(num_rows - start) // chunks_left)
            try:
                parts.append(compute(slice(start, stop)))
            except (torch.cuda.OutOfMemoryError, OutOfMemory) as error:  # the latter from chunks within this one
                if stop - start == 1:
                    raise self._advice() from error
                self.limit = (stop - start) // 2
            else:
                start = stop
                continue
            torch.cuda.empty_cache()  # outside the except clause, whose traceback keeps the failed chunk's tensors
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _advice(self) -> OutOfMemory:
        return OutOfMemory(
            f"The accelerator has too little memory for one sample ({self._what}).",
            expected="about 7 GiB free for Stable Diffusion 1.4 in bfloat16, 14 GiB in float32",
            todo="set sampler.dtype=bfloat16, run one rank per GPU, or free the GPU of other programs",
        )
