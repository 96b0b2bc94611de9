"""One rank of `nd train`: open the shards, then train the stages with DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from launch.rank import Rank
from nd_dist.config import Config
from nd_dist.schema import INITIAL, TargetSpec
from nd_dist.training.run import train
from nd_dist.training.source import StageRequest, Stream
from nd_dist.world import World
from shards.reader import ShardReader
from shards.stream import StreamConfig, TrialStream

CHUNK_IMAGES = 64


class ShardSource:
    """The training data of packed shards, as ``nd_dist.training`` asks for it.

    Args:
        config: The recipe.
        world: Which share of every step this rank reads.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._reader = ShardReader(config.shards_dir)
        self._world, self._threads = world, config.training.reader_threads
        self.specs: tuple[TargetSpec, ...] = self._reader.index.target_specs
        self.num_voxels: Mapping[int, int] = self._reader.num_voxels
        self.index_id: str = self._reader.index.id

    def open_stream(self, request: StageRequest) -> Stream:
        """Return this rank's stream of a stage."""
        config = StreamConfig(
            subjects=request.subjects,
            targets=request.targets,
            samples_per_subject=request.samples_per_subject,
            seed=request.seed,
            rank=self._world.rank,
            world_size=self._world.size,
            sessions=request.sessions,
            threads=self._threads,
        )
        return TrialStream(self._reader, config)

    def training_rows(
        self, subject: int, sessions: tuple[int, ...] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (voxels (B, V), z (B, C, H, W)) of every training image of a subject, chunk by chunk."""
        image_ids = self._reader.images(subject, "train", sessions)
        for start in range(0, len(image_ids), CHUNK_IMAGES):
            chunk = image_ids[start : start + CHUNK_IMAGES]
            voxels_BV = self._reader.voxels(subject, chunk, sessions)
            yield torch.from_numpy(voxels_BV), torch.from_numpy(self._reader.targets(INITIAL, chunk))


def work(rank: Rank) -> None:
    """Train this rank's share of every global batch."""
    train(rank.config, rank.world, ShardSource(rank.config, rank.world), rank.events, rank.should_stop)
