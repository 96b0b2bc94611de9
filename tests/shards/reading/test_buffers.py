from __future__ import annotations

import gc

import numpy as np
import torch

from shards.reading.buffers import BufferPool


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_lent_again_once_nobody_holds_it() -> None:
    pool = BufferPool()
    first = address(array := pool.lend((4, 5), "<f2"))
    del array
    gc.collect()
    assert address(pool.lend((2, 10), "<f2")) == first


def test_memory_is_not_lent_while_an_array_a_view_or_a_tensor_holds_it() -> None:
    pool = BufferPool()
    array = pool.lend((4, 5), np.float32)
    taken = address(array)
    holders = [array[1:], array.reshape(-1)[3:], torch.from_numpy(array).view(20)[2:], array.T]
    del array
    while holders:
        gc.collect()
        assert pool.num_free_bytes == 0
        other = pool.lend((4, 5), np.float32)
        assert address(other) != taken
        del other
        pool._free.clear()
        holders.pop()
    gc.collect()


def test_a_consumer_that_keeps_its_batches_keeps_their_values() -> None:
    pool = BufferPool()
    kept = []
    for value in range(20):
        array = pool.lend((100,), np.float32)
        array[:] = value
        kept.append(torch.from_numpy(array)[50:])
    assert [float(tensor[0]) for tensor in kept] == list(range(20))


def test_memory_of_another_kind_is_lent_alike() -> None:
    made: list[torch.Tensor] = []

    def allocate(num_bytes: int) -> memoryview:  # as page-locked memory is made, on a machine without CUDA
        made.append(torch.empty(num_bytes, dtype=torch.uint8))
        return memoryview(made[-1].numpy())

    pool = BufferPool(allocate)
    for value in (1.0, 2.0):
        array = pool.lend((3, 2), np.float32)
        assert address(array) == made[0].data_ptr()
        array[:] = value
        assert float(torch.from_numpy(array).sum()) == 6 * value
        del array
        gc.collect()
    assert len(made) == 1


def test_an_empty_array_can_be_lent() -> None:
    assert BufferPool().lend((0, 5), np.float32).shape == (0, 5)
