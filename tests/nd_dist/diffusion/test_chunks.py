from __future__ import annotations

import pytest
import torch

from nd_dist.diffusion.chunks import CPU_UNET_BYTES, CPU_VAE_BYTES, AdaptiveChunks, OutOfMemory, first_rows


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


def test_chunks_of_stable_diffusion_s_size_have_one_row_on_a_cpu_and_all_on_a_gpu() -> None:
    unet_layer, vae_layer = 64 * 64 * 320, 512 * 512 * 256
    assert first_rows(torch.device("cpu"), unet_layer, CPU_UNET_BYTES) == 1
    assert first_rows(torch.device("cpu"), vae_layer, CPU_VAE_BYTES) == 1
    assert first_rows(torch.device("cpu"), 64 * 64 * 16, CPU_VAE_BYTES) == 64
    assert first_rows(torch.device("cuda"), vae_layer, CPU_VAE_BYTES) > 1000


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
