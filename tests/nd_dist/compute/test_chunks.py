from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nd_dist.compute.chunks import CPU_UNET_BYTES, CPU_VAE_BYTES, AdaptiveChunks, OutOfMemory, cpu_rows


class Accelerator:
    """Has memory for a few rows; remembers the chunks that it was given."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sizes: list[int] = []

    def double(self, rows: slice) -> tuple[torch.Tensor, ...]:
        size = rows.stop - rows.start
        self.sizes.append(size)
        if size > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        values = torch.arange(rows.start, rows.stop)
        return 2 * values, values.float()


def test_rows_come_back_in_order_from_equal_chunks() -> None:
    accelerator = Accelerator(capacity=100)
    doubled, plain = AdaptiveChunks("test", 8).run(20, accelerator.double)
    assert doubled.tolist() == [2 * row for row in range(20)]
    assert plain.tolist() == list(range(20))
    assert accelerator.sizes == [7, 7, 6]


def test_chunks_are_halved_until_they_fit_and_the_size_is_remembered() -> None:
    chunks, accelerator = AdaptiveChunks("test", 100), Accelerator(capacity=3)
    assert chunks.run(20, accelerator.double)[0].tolist() == [2 * row for row in range(20)]
    assert accelerator.sizes[:4] == [20, 10, 5, 2]
    tried = len(accelerator.sizes)
    chunks.run(20, accelerator.double)
    assert max(accelerator.sizes[tried:]) <= 3


def test_one_row_that_does_not_fit_ends_with_advice() -> None:
    with pytest.raises(OutOfMemory, match="bfloat16"):
        AdaptiveChunks("VAE", 4).run(3, Accelerator(capacity=0).double)


class Memory(Accelerator):
    """The same, and a meter of it: every row takes 10 bytes, and half of what is free may be out of reach."""

    def __init__(self, capacity: int, free: int) -> None:
        super().__init__(capacity)
        self.free = free

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, call: Callable[[], object]) -> int:
        tried = len(self.sizes)
        call()
        return 10 * max(self.sizes[tried:])


def test_free_memory_decides_how_many_rows_ride_together() -> None:
    memory = Memory(capacity=100, free=100)
    chunks = AdaptiveChunks("test", None, memory)
    assert chunks.run(20, memory.double)[0].tolist() == [2 * row for row in range(20)]
    assert memory.sizes == [1, 7, 7, 6], "85 of 100 bytes are planned for: 8 rows at most, in equal chunks"
    chunks.run(20, memory.double)
    assert memory.sizes[4:] == [7, 7, 6], "measured once, and every call has the same chunks"


def test_a_single_row_is_not_measured_but_run() -> None:
    memory = Memory(capacity=1, free=5)
    chunks = AdaptiveChunks("test", None, memory)
    assert chunks.run(1, memory.double)[0].tolist() == [0]
    assert memory.sizes == [1]
    assert chunks.limit is None


def test_a_measure_that_was_too_hopeful_is_halved_and_one_that_says_nothing_fits_still_tries() -> None:
    memory = Memory(capacity=3, free=100)
    assert AdaptiveChunks("test", None, memory).run(8, memory.double)[0].tolist() == [2 * row for row in range(8)]
    assert max(memory.sizes[2:]) == 4
    full = Memory(capacity=3, free=0)
    assert len(AdaptiveChunks("test", None, full).run(3, full.double)[0]) == 3
    assert full.sizes == [1, 1, 1, 1]


def test_where_one_row_does_not_fit_a_rescue_is_tried_once() -> None:
    memory = Memory(capacity=0, free=20)
    calls: list[int] = []

    def rescue() -> bool:
        calls.append(1)
        memory.capacity = 1
        return len(calls) == 1

    assert AdaptiveChunks("test", None, memory, rescue).run(2, memory.double)[0].tolist() == [0, 2]
    assert memory.sizes == [1, 1, 1, 1]
    memory.capacity = 0
    with pytest.raises(OutOfMemory):
        AdaptiveChunks("test", 1, memory, lambda: False).run(2, memory.double)


def test_chunks_of_stable_diffusion_s_size_have_one_row_on_a_cpu() -> None:
    unet_layer, vae_layer = 64 * 64 * 320, 512 * 512 * 256
    assert cpu_rows(unet_layer, CPU_UNET_BYTES) == 1
    assert cpu_rows(vae_layer, CPU_VAE_BYTES) == 1
    assert cpu_rows(64 * 64 * 16, CPU_VAE_BYTES) == 64


def test_chunks_within_chunks_let_the_outer_ones_shrink() -> None:
    outer, inner = AdaptiveChunks("UNet", 8), AdaptiveChunks("VAE", 8)
    held: list[int] = []

    def vae(rows: slice) -> tuple[torch.Tensor, ...]:
        if held[-1] + (rows.stop - rows.start) > 3:
            raise torch.cuda.OutOfMemoryError("the UNet's graph leaves no room")
        return (torch.arange(rows.start, rows.stop),)

    def unet(rows: slice) -> tuple[torch.Tensor, ...]:
        held.append(rows.stop - rows.start)
        (values,) = inner.run(rows.stop - rows.start, vae)
        return (values + rows.start,)

    assert outer.run(8, unet)[0].tolist() == list(range(8))
    assert (outer.limit, inner.limit) == (2, 1)


def test_other_errors_pass_through() -> None:
    def broken(_rows: slice) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        AdaptiveChunks("test", 4).run(3, broken)
