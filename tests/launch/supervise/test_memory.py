"""The memory table's counts against what a real DeepSpeed training keeps; real modules at full size on no device."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from benchmarks.training_memory import full_size
from launch.supervise.memory import Counts, count, kept_bytes
from nd_dist.config import Config, TrainingConfig
from nd_dist.training.parameters import REDUCE_BUCKET
from tests.nd_dist.training.one_rank import run
from tests.ranks.recipe import small_recipe


def live_bytes() -> int:
    """Bytes of all tensors of this process that Python knows, shared storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def wide_recipe(folder: Path, **training: object) -> Config:
    config = small_recipe(folder, stages=(1,), steps=(3, 1), targets=("z",), checkpoint_every=1000, **training)
    wide = {"hidden_size": 512, "initial_channels": (8, 16, 16)}
    return config.model_copy(update={"decoder": config.decoder.model_copy(update=wide)})


@pytest.mark.launch
@pytest.mark.parametrize(
    ("zero_stage", "dtype", "shard_layers"),
    [(0, "float32", False), (1, "float32", True), (2, "bfloat16", False), (3, "float32", False)],
)
def test_weights_and_optimizer_state_are_as_counted(
    zero_stage: int, dtype: str, shard_layers: bool, tmp_path: Path
) -> None:
    config = wide_recipe(tmp_path, zero_stage=zero_stage, dtype=dtype, shard_layers=shard_layers)
    before, found = live_bytes(), 0

    def measure() -> bool:  # asked before every step: gradients and activations of the one before are gone
        nonlocal found
        found = live_bytes() - before
        return False

    events = run(config, should_stop=measure)
    total = sum(next(event for event in events if event["event"] == "model")["parameters"].values())
    divided = next(event for event in events if event["event"] == "sharded_layers")["layers"]
    assert bool(divided) == shard_layers
    num_divided = 2 * 512 * 512 + 512 * 32 if divided else 0  # blocks, and the linear map to an 8 x 2 x 2 map
    num_divided += 512 * (36 + 44) if divided else 0
    expected = kept_bytes(Counts(total - num_divided, num_divided, 0), 1, zero_stage, dtype == "bfloat16")
    buffer = 4 * REDUCE_BUCKET if zero_stage == 3 else 0
    assert found - buffer == pytest.approx(expected - buffer, rel=0.12)


def test_the_published_single_decoder_leaves_deepspeed_little_at_full_size() -> None:
    counts = count(full_size(("g02",), "single", 4096), TrainingConfig(), rows=42, ranks=6)
    assert counts.deepspeed == pytest.approx(56.8e6, rel=0.02)  # the prior and the projector
    encoders = 4096 * sum((14278, 15226, 13153, 13039, 17907, 12682, 14386))
    assert counts.divided == pytest.approx(encoders + 4096 * 38400, rel=0.01)
