"""What training needs from the data side, as protocols and values: training never imports a reader.

The caller (a rank program) implements ``TrainingSource`` over whatever holds the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.schema import INITIAL, Batch, TargetSpec


@dataclass(frozen=True)
class StageRequest:
    """The stream that a stage asks for; every field but the rank, which the caller knows.

    Args:
        stage: 1 (all subjects but the target) or 2 (the target).
        subjects: Subjects in every batch, sorted.
        targets: Names of the targets in every batch.
        samples_per_subject: Trials of each subject in a *global* batch.
        sessions: Sessions to draw from; none: all.
        seed: Seed of the run.
        pictures: Whether batches carry the pictures (a teacher looks at them).
    """

    stage: int
    subjects: tuple[int, ...]
    targets: tuple[str, ...]
    samples_per_subject: int
    sessions: tuple[int, ...] | None
    seed: int
    pictures: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of a global batch."""
        return self.samples_per_subject * len(self.subjects)


class Stream(Protocol):
    """An endless, resumable stream of one rank's batches: rows r, r + R, ... of every step on rank r of R.

    A batch names all subjects, also those of which this rank has no row. The state is JSON, the same on every rank.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the loaded state on; ``Batch.step`` counts them over the whole stage."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """Return the state from which the next batch follows."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a state."""
        ...

    def close(self) -> None:
        """Stop reader threads and close files."""
        ...


class TrainingSource(Protocol):
    """The data of a training."""

    @property
    def specs(self) -> tuple[TargetSpec, ...]:
        """Targets that exist, with shapes."""
        ...

    @property
    def num_voxels(self) -> Mapping[int, int]:
        """Subject -> number of voxels."""
        ...

    def identity(self, request: StageRequest) -> Mapping[str, object]:
        """Return what tells the data of a stage from others: a run continues on the same data only."""
        ...

    def open_stream(self, request: StageRequest) -> Stream:
        """Return this rank's stream of a stage."""
        ...

    def fit_images(self, subject: int, sessions: Sequence[int] | None) -> list[int]:
        """Return the ascending ids of the images that a subject is trained on, held-out images left out."""
        ...

    def mean_voxels(
        self, subject: int, image_ids: Sequence[int], sessions: Sequence[int] | None
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Return the mean voxels (N, V) of a subject's trials of images, and how many trials each is the mean of."""
        ...

    def image_targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target (N, *shape) of images."""
        ...

    def image_classes(self) -> Mapping[str, Sequence[int]]:
        """Return class -> ids of the images that show it, empty where nothing is known; asked on rank 0 only."""
        ...

    def validation_images(self, subject: int) -> tuple[str, list[int]]:
        """Return where a subject's validation images come from, ``heldout`` or ``test``, and their ascending ids."""
        ...

    def validation_trials(
        self, subject: int, image_ids: Sequence[int], targets: Sequence[str]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return voxels (B, 3, V) of the repeats of validation images, and targets by name (B, *shape).

        An image seen less often has its repeats repeated in turn (a, a, a or a, b, a), as published.
        """
        ...


def stage_request(config: Config, stage: int, world_size: int) -> StageRequest:
    """Return the stream that a stage of this recipe needs.

    Raises:
        ConfigError: stage 1 has no subject besides the target.
    """
    training = config.training
    others = tuple(sorted(set(config.data.subjects) - {training.target_subject}))
    subjects = others if stage == 1 else (training.target_subject,)
    if not subjects:
        raise ConfigError(
            "Stage 1 has no subject to train on.",
            where="data.subjects, training.target_subject",
            expected="a subject besides the target",
            found=f"subjects {list(config.data.subjects)}, target {training.target_subject}",
            todo="add subjects, or train from scratch with training.stages=[2]",
        )
    _, samples = training.schedule(stage)
    if training.rows_per_rank is not None:
        samples = -(-training.rows_per_rank * world_size // len(subjects))
    sessions = training.sessions if stage == 2 else None
    has_pictures = INITIAL in training.targets and training.teacher is not None
    return StageRequest(stage, subjects, training.targets, samples, sessions, config.seed, has_pictures)


def stage_length(config: Config, request: StageRequest) -> tuple[int, float]:
    """Return the optimizer steps and the peak learning rate of a stage.

    Where the batch grows with the ranks (``rows_per_rank``) as many samples are seen in all, and the rate grows with
    the square root of the batch.

    Source: Malladi et al. (2022), "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms".
    """
    steps, samples = config.training.schedule(request.stage)
    factor = request.samples_per_subject / samples
    return max(1, round(steps / factor)), config.training.learning_rate * math.sqrt(factor)


def stage_specs(config: Config, source: TrainingSource) -> tuple[TargetSpec, ...]:
    """Return the specs of the targets to train, in the recipe's order.

    Raises:
        ConfigError: the data has no such target.
    """
    by_name = {spec.name: spec for spec in source.specs}
    if missing := [name for name in config.training.targets if name not in by_name]:
        raise ConfigError(
            "Targets to train are not in the packed data.",
            where="training.targets",
            expected=f"some of {sorted(by_name)}",
            found=missing,
            todo="pack them (data.targets), or train on fewer",
        )
    return tuple(by_name[name] for name in config.training.targets)
