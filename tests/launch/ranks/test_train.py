from __future__ import annotations

from itertools import islice

import pytest
import torch

from launch.ranks.train import ShardSource
from nd_dist.config import Config, TrainingConfig
from nd_dist.training.objective.objectives import StepInputs
from nd_dist.training.source import StageRequest
from nd_dist.world import World
from shards.phantom.write import write_phantom
from shards.reading.reader import ShardReader
from shards.reading.stream import StreamConfig, TrialStream
from tests.shards.support import PHANTOM, SEED, make_config, pack_alone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("packed")
    write_phantom(folder / "nsd", PHANTOM, SEED)
    config = make_config(folder / "nsd", folder / "shards", int8_targets=("z",))
    pack_alone(config)
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("settings", "voxels", "targets"),
    [
        ({}, torch.float16, torch.float16),
        ({"repeats": "mean"}, torch.float32, torch.float16),
        ({"int8_targets": True}, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_a_training_is_given_what_is_stored_and_computes_with_the_numbers_of_single_precision(
    packed: Config, settings: dict[str, object], voxels: torch.dtype, targets: torch.dtype, dtype: torch.dtype
) -> None:
    config = packed.model_copy(update={"training": TrainingConfig(**settings)})  # type: ignore[arg-type]
    request = StageRequest(1, (1, 2), ("z",), 6, None, seed=3)
    stream = ShardSource(config, World()).open_stream(request)
    training = config.training
    wide = StreamConfig((1, 2), ("z",), 6, 3, repeats=training.repeats, int8=training.int8_targets)
    with TrialStream(ShardReader(config.shards_folder), wide) as single:
        for batch, expected in zip(islice(stream, 8), single, strict=False):
            assert {values.dtype for values in batch.voxels.values()} == {voxels}
            assert batch.targets["z"].dtype == targets
            assert expected.voxels[1].dtype == expected.targets["z"].dtype == torch.float32
            found = StepInputs.of(batch, CPU, dtype)
            for subject in (1, 2):
                assert torch.equal(found.voxels[subject], expected.voxels[subject].to(dtype))
            assert torch.equal(found.targets["z"], expected.targets["z"])
    stream.close()
