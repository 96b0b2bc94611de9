"""One rank of `nd train`: open the shards, then train the stages with DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from launch.ranks.rank import Rank, refuse_to_run
from nd_dist.config import Config
from nd_dist.schema import TargetSpec
from nd_dist.training.run import train
from nd_dist.training.source import StageRequest, Stream
from nd_dist.training.validation import REPEATS
from nd_dist.world import World
from shards.format.codec import stores_of
from shards.format.splits import open_index
from shards.reading.reader import ShardReader
from shards.reading.stream import StreamConfig, TrialStream
from shards.sources.classes import read_classes


class ShardSource:
    """The training data of packed shards, as ``nd_dist.training`` asks for it.

    Args:
        config: The recipe.
        world: Which share of every step this rank reads.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._reader = ShardReader.over(open_index(config))
        self._config, self._world, self._training = config, world, config.training
        self.specs: tuple[TargetSpec, ...] = self._reader.index.target_specs
        self.num_voxels: Mapping[int, int] = self._reader.num_voxels

    def identity(self, request: StageRequest) -> Mapping[str, object]:
        """Return hashes of everything that a stage reads, and of everything that was packed."""
        stores = stores_of(request.targets, self._training.int8_targets)
        return self._reader.index.identity(request.subjects, stores, request.sessions)

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
            threads=self._training.reader_threads,
            repeats=self._training.repeats,
            int8=self._training.int8_targets,
            heldout_fraction=self._training.heldout_fraction,
            dtype="stored",
            pictures=request.pictures,
        )
        return TrialStream(self._reader, config)

    def fit_images(self, subject: int, sessions: Sequence[int] | None) -> list[int]:
        """Return the ascending ids of the images that a subject is trained on, held-out images left out."""
        heldout = set(self._reader.heldout_images(subject, self._training.heldout_fraction))
        return [image_id for image_id in self._reader.images(subject, "train", sessions) if image_id not in heldout]

    def mean_voxels(
        self, subject: int, image_ids: Sequence[int], sessions: Sequence[int] | None
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Return the mean voxels (N, V) of a subject's trials of images, and how many trials each is the mean of."""
        return self._reader.voxels_and_repeats(subject, image_ids, sessions)

    def image_targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target (N, *shape) of images."""
        (store,) = stores_of([name], self._training.int8_targets)
        return self._reader.targets(store, image_ids)

    def image_classes(self) -> Mapping[str, Sequence[int]]:
        """Return class -> ids of the images that show it; empty where the recipe's file is not at hand."""
        path = self._config.evaluation.image_classes
        return read_classes(self._config.nsd_root, path) if path is not None and path.exists() else {}

    def validation_images(self, subject: int) -> tuple[str, list[int]]:
        """Return ``heldout`` or ``test``, and the ascending ids of such images that a subject saw."""
        fraction = self._training.heldout_fraction
        if fraction == 0:
            return "test", self._reader.images(subject, "test")
        return "heldout", self._reader.heldout_images(subject, fraction)

    def validation_trials(
        self, subject: int, image_ids: Sequence[int], targets: Sequence[str]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return voxels (B, 3, V) of the repeats of images, and targets by name (B, *shape)."""
        trials = self._reader.trials
        own = trials[trials["subject"] == subject]
        rows = np.concatenate([np.resize(own[own["image"] == image_id], REPEATS) for image_id in image_ids])
        stored = np.empty((len(rows), self.num_voxels[subject]), dtype=self._reader.index.voxels.dtype)
        self._reader.read_voxels(rows, stored)
        voxels_BRV = torch.from_numpy(stored).float().view(len(image_ids), REPEATS, -1)
        return voxels_BRV, {name: torch.from_numpy(self._reader.targets(name, image_ids)) for name in targets}


def work(rank: Rank) -> None:
    """Train this rank's share of every global batch."""
    rank.use_device()
    train(rank.config, rank.world, ShardSource(rank.config, rank.world), rank.events, rank.should_stop)


if __name__ == "__main__":  # `deepspeed --module` would take a module that does nothing for a success
    refuse_to_run("launch.ranks.train")
