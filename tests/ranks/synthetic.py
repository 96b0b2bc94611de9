"""A small made-up training set with a known answer: voxels and targets are maps of the same hidden picture factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nd_dist.schema import Batch, TargetSpec, role_of
from nd_dist.seeds import unit_seed
from nd_dist.training.source import StageRequest

NUM_FACTORS = 12
NUM_IMAGES = 60
NUM_TEST = 11
SHAPES: dict[str, tuple[int, ...]] = {"c": (6, 16), "z": (4, 8, 8), "g02": (5, 12), "g04": (5, 12)}


def normal(*shape: int, words: tuple[int | str, ...]) -> np.ndarray:
    return np.random.default_rng(unit_seed(7, *words)).standard_normal(shape).astype(np.float32)


@dataclass
class SyntheticSource:
    """A ``TrainingSource``; ``bad_step`` puts a NaN into one row of rank ``bad_rank`` at that micro-step."""

    rank: int = 0
    world_size: int = 1
    bad_step: int = -1
    bad_rank: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    num_voxels: Mapping[int, int] = field(default_factory=lambda: {1: 40, 2: 36, 5: 44, 7: 38})
    content: str = "synthetic"

    @property
    def specs(self) -> tuple[TargetSpec, ...]:
        return tuple(TargetSpec(name, role_of(name), shape) for name, shape in self.shapes.items())

    def factors(self, image_id: np.ndarray) -> np.ndarray:
        return normal(NUM_IMAGES + NUM_TEST, NUM_FACTORS, words=("factors",))[image_id]

    def clean_voxels(self, subject: int, image_id: np.ndarray) -> np.ndarray:
        weights = normal(NUM_FACTORS, self.num_voxels[subject], words=("voxels", subject))
        return (self.factors(image_id) @ weights / np.sqrt(NUM_FACTORS)).astype(np.float32)

    def target(self, name: str, image_id: np.ndarray) -> torch.Tensor:
        shape = self.shapes[name]
        weights = normal(NUM_FACTORS, int(np.prod(shape)), words=("target", name))
        return torch.from_numpy(np.tanh(self.factors(image_id) @ weights / 3).reshape(-1, *shape))

    def identity(self, request: StageRequest) -> dict[str, object]:
        return {"data.content": f"{self.content}, subjects {request.subjects}"}

    def open_stream(self, request: StageRequest) -> SyntheticStream:
        return SyntheticStream(self, request)

    def fit_images(self, subject: int, sessions: Sequence[int] | None) -> list[int]:
        return list(range(NUM_IMAGES))

    def mean_voxels(
        self, subject: int, image_ids: Sequence[int], sessions: Sequence[int] | None
    ) -> tuple[np.ndarray, list[int]]:
        counts = [1 + image_id % 3 for image_id in image_ids]
        noise = np.stack([normal(self.num_voxels[subject], words=("fit", subject, int(i))) for i in image_ids])
        scale = 0.3 / np.sqrt(np.array(counts, dtype=np.float32))[:, None]
        return self.clean_voxels(subject, np.array(image_ids)) + scale * noise, counts

    def image_targets(self, name: str, image_ids: Sequence[int]) -> np.ndarray:
        return self.target(name, np.array(image_ids)).numpy()

    def image_classes(self) -> dict[str, list[int]]:
        return {}

    def validation_images(self, subject: int) -> tuple[str, list[int]]:
        return "test", list(range(NUM_IMAGES, NUM_IMAGES + NUM_TEST))

    def validation_trials(
        self, subject: int, image_ids: Sequence[int], targets: Sequence[str]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        ids = np.array(image_ids)
        noise = [normal(3, self.num_voxels[subject], words=("test noise", subject, int(i))) for i in ids]
        voxels = self.clean_voxels(subject, ids)[:, None] + 0.3 * np.stack(noise)
        return torch.from_numpy(voxels), {name: self.target(name, ids) for name in targets}

    def pictures(self, image_ids: Sequence[int]) -> torch.Tensor:
        colours = normal(NUM_IMAGES + NUM_TEST, 3, words=("colours",))[list(image_ids)]
        grey = (
            torch.arange(256, dtype=torch.float32).view(1, 16, 16, 1) + 40 * torch.from_numpy(colours)[:, None, None]
        )
        return grey.clamp(0, 255).to(torch.uint8)


class SyntheticStream:
    def __init__(self, source: SyntheticSource, request: StageRequest) -> None:
        self.source, self.request, self.step = source, request, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.step += 1
            yield self.batch(self.step - 1)

    def batch(self, step: int) -> Batch:
        source, count = self.source, self.request.samples_per_subject
        voxels: dict[int, torch.Tensor] = {}
        columns: dict[str, list[np.ndarray]] = {"subject": [], "image_id": [], "sample_id": []}
        for i, subject in enumerate(self.request.subjects):
            place = np.arange((source.rank - i * count) % source.world_size, count, source.world_size)
            generator = np.random.default_rng(unit_seed(self.request.seed, "images", step, subject))
            image_id = generator.integers(0, NUM_IMAGES, count)[place]
            noise = normal(count, source.num_voxels[subject], words=("noise", step, subject))[place]
            voxels[subject] = torch.from_numpy(source.clean_voxels(subject, image_id) + 0.3 * noise)
            columns["subject"].append(np.full(len(place), subject))
            columns["image_id"].append(image_id)
            columns["sample_id"].append(i * count + place)
        merged = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
        if step == source.bad_step and source.rank == source.bad_rank:
            next(rows for rows in voxels.values() if len(rows))[0, 3] = float("nan")
        zeros = np.zeros(len(merged["subject"]), dtype=np.int64)
        targets = {name: source.target(name, merged["image_id"]) for name in self.request.targets}
        pictures = source.pictures(merged["image_id"].tolist()) if self.request.pictures else None
        return Batch(step, voxels, targets, merged["subject"], zeros, zeros, merged["image_id"], zeros,
                     merged["sample_id"], pictures=pictures)  # fmt: skip

    def state_dict(self) -> dict[str, object]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.step = int(state["step"])  # type: ignore[call-overload]

    def close(self) -> None:
        pass
