"""On a phantom NSD, read from its shards: what pretraining on other subjects is worth, and chance stays chance."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from launch.ranks.train import ShardSource
from nd_dist.comm import Comm
from nd_dist.config import Config, DataConfig, DecoderConfig, PhantomConfig, TrainingConfig
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.schema import Batch, TargetSpec
from nd_dist.training.run import train
from nd_dist.training.source import StageRequest, Stream
from nd_dist.world import World
from shards.packing.pack import pack
from shards.phantom.write import write_phantom
from tests.shards.support import pool

NUM_TEST = 20
PHANTOM = PhantomConfig(
    num_subjects=4, num_sessions=6, trials_per_session=60, num_shared=NUM_TEST, num_voxels=200, noise_ceiling=0.8
)


class CoarsePixels:
    """A target extractor: 8 x 8 pooled pixels as 16 tokens of 12, centred."""

    specs = (TargetSpec("g02", "guidance", (16, 12)),)
    fingerprint: Mapping[str, object] = {"extractor": "coarse pixels"}

    def extract(
        self,
        pictures_BHWC: npt.NDArray[np.uint8],
        captions: Sequence[Sequence[str]],
        image_ids: Sequence[int],
        wanted: Collection[str],
    ) -> dict[str, npt.NDArray[np.float32]]:
        return {"g02": 4 * (pool(pictures_BHWC, 8) - 0.5).reshape(len(image_ids), 16, 12)}


class Shuffled(ShardSource):
    """The same shards, with every trial's voxels given to another trial of its batch."""

    def open_stream(self, request: StageRequest) -> Stream:
        return _ShuffledStream(super().open_stream(request))


class _ShuffledStream:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.state_dict, self.load_state_dict, self.close = stream.state_dict, stream.load_state_dict, stream.close

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._stream:
            yield replace(batch, voxels={s: voxels.roll(1, dims=0) for s, voxels in batch.voxels.items()})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder / "nsd", PHANTOM, seed=3)
    data = DataConfig(
        subjects=(1, 2, 3, 4), targets=("g02",), pictures="none", captions=str(folder / "nsd" / "captions")
    )
    config = Config(nsd_root=folder / "nsd", shards_dir=folder / "shards", run_dir=folder / "pack", data=data)
    pack(config, Comm(), EventLog(config.run_dir, 0, "pack"), CoarsePixels())
    return config


def found_by(config: Config, run_dir: Path, stages: tuple[int, ...], source: type[ShardSource]) -> dict[str, float]:
    """The last validation of a training with one session of the target subject in stage 2."""
    config = config.model_copy(
        update={
            "run_dir": run_dir,
            "decoder": DecoderConfig(hidden_size=64, num_blocks=2, prior_depth=0),
            "training": TrainingConfig(
                targets=("g02",), stages=stages, sessions=(1,), steps=(300, 100), samples_per_subject=(12, 16),
                learning_rate=3e-3, weight_decay=0.1, warmup_fraction=0.1, prior_weight=1.0, mixco_fraction=0.3,
                checkpoint_every=1000, validate_every=1000,
            ),
        }
    )  # fmt: skip
    torch.set_num_threads(1)
    train(config, World(), source(config, World()), EventLog(run_dir, 0, "train"), lambda: False)
    validations = [e for e in read_events(events_path(run_dir, 0)) if e["event"] == "validation"]
    values: dict[str, float] = validations[-1]["values"]
    return values


@pytest.mark.launch
def test_pretraining_on_other_subjects_pays_with_one_session_and_shuffled_voxels_stay_at_chance(
    packed: Config, tmp_path: Path
) -> None:
    alone = found_by(packed, tmp_path / "alone", (2,), ShardSource)
    after = found_by(packed, tmp_path / "after", (1, 2), ShardSource)
    shuffled = found_by(packed, tmp_path / "shuffled", (2,), Shuffled)

    chance = 1 / NUM_TEST
    assert after["loss"] < alone["loss"]
    assert after["g02/prior"] < alone["g02/prior"]
    assert after["g02/top1_image_given_voxels"] >= alone["g02/top1_image_given_voxels"] > 3 * chance
    assert shuffled["g02/top1_image_given_voxels"] <= 3 * chance
    assert shuffled["g02/prior"] > after["g02/prior"]
