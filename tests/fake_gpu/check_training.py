"""A training step of the published decoders at h=4096, its validation, and collective calls on several ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.training_memory import SHAPES, VOXELS
from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import Batch, TargetSpec, role_of
from nd_dist.training.engine.shard_optimizer import ShardOptimizer
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.objective.objectives import Objective, StepInputs
from nd_dist.training.ranks import gather_rows, identity
from nd_dist.training.validation import REPEATS, Validation
from nd_dist.world import World
from tests.fake_gpu.conftest import Budget
from tests.support.fake_gpu.gpu import PretendedGpu, pretended_gpu

STEPS = 107_100
IRREPRODUCIBLE = {"convolution_backward", "embedding_dense_backward", "index_put", "index_put_"}
"""What docs/gpu.md says of training; index_put meets no row twice."""
PHASES = {"MixCo": 0, "SoftCLIP": 60_000}
CUDA = torch.device("cuda", 0)
SUBJECTS = tuple(subject for subject in VOXELS if subject != 1)


@pytest.fixture(scope="module")
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu(16.0) as gpu:  # the smallest card
        yield gpu


@contextmanager
def ranks(size: int) -> Iterator[World]:
    """Be rank 0 of a group whose collective calls do nothing."""
    gc.collect()  # modules are circles: what the test before left takes memory until then
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, "torch")
    finally:
        distributed.destroy_process_group()


class Training:
    """What one rank holds of a training in stage 1: objective and optimizers, as the engine makes them."""

    def __init__(self, world: World, target: str, per_subject: int = 6, **decoder: int) -> None:
        self.world, self.target, self.own_rows = world, target, per_subject // world.size
        self._training = TrainingConfig(dtype="bfloat16", targets=(target,), quirks="official")
        with torch.device("cuda"):
            specs = [TargetSpec(target, role_of(target), SHAPES[target])]
            voxels = {subject: VOXELS[subject] for subject in SUBJECTS}
            self.decoder = Decoder(DecoderConfig(heads="single", **decoder), voxels, specs)
        layers = shard_large_layers(self.decoder, per_subject * len(SUBJECTS), per_subject, world, CUDA)
        self.decoder.to(torch.bfloat16)
        gather = identity if world.size == 1 else gather_rows
        self.objective = Objective(self.decoder, self._training, STEPS, 42, gather)
        self._shards = ShardOptimizer(layers, self._training, world, CUDA)
        self._optimizer = self.objective.optimizer(self._training)

    def batch(self) -> Batch:
        """Return this rank's rows on the host, as the stream hands them out."""
        rows = self.own_rows * len(SUBJECTS)
        voxels = {subject: torch.ones(self.own_rows, VOXELS[subject]) for subject in SUBJECTS}
        targets = {self.target: torch.ones(rows, *SHAPES[self.target])}
        ids = np.arange(rows)
        return Batch(0, voxels, targets, *[ids] * 5, sample_id=ids)

    def step(self, batch: Batch, step: int) -> None:
        """Make one optimizer step."""
        loss, _terms = self.objective(StepInputs.of(batch, CUDA, torch.bfloat16), step)
        loss.backward()
        self._shards.norm()
        self._optimizer.step()
        self._shards.step(3e-4, (0.9, 0.999))
        self._optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(("target", "phase"), [("c", "MixCo"), ("c", "SoftCLIP"), ("z", "MixCo")])
def test_a_step_stays_within_its_budget_on_the_smallest_card(
    gpu: PretendedGpu, budget: Budget, target: str, phase: str
) -> None:
    with ranks(1) as world:
        training = Training(world, target)
        batch = training.batch()
        training.step(batch, PHASES[phase])  # makes gradients and moments
        gpu.take()
        gpu.reset_peak()
        training.step(batch, PHASES[phase])
        counts = gpu.take()
        budget.check(f"train {target}, {'' if target == 'z' else phase + ', '}42 rows", gpu.cost(counts))
        assert set(counts.irreproducible) <= IRREPRODUCIBLE, "docs/gpu.md lists what may differ between two runs"
        if (target, phase) == ("c", "SoftCLIP"):
            validate(gpu, budget, training)


class TestImages:
    """A source of as many test images as a chunk of the validation has."""

    specs: tuple[TargetSpec, ...] = ()
    __test__ = False

    def test_images(self, subject: int) -> list[int]:
        return list(range(25))

    def test_trials(
        self, subject: int, image_ids: Sequence[int], targets: Sequence[str]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        rows = len(image_ids)
        return torch.ones(rows, REPEATS, VOXELS[subject]), {name: torch.ones(rows, *SHAPES[name]) for name in targets}


def validate(gpu: PretendedGpu, budget: Budget, training: Training) -> None:
    gpu.reset_peak()
    config = TrainingConfig(targets=(training.target,))
    validation = Validation(TestImages(), SUBJECTS[0], config, training.world, identity)  # type: ignore[arg-type]
    assert "loss" in validation(training.decoder)
    budget.check("validate c, 25 images", gpu.cost(gpu.take()))


@pytest.mark.parametrize(("size", "per_subject"), [(1, 6), (2, 6), (6, 6), (8, 8)])
def test_collective_calls_get_no_tensor_of_the_cpu(gpu: PretendedGpu, size: int, per_subject: int) -> None:
    with ranks(size) as world:
        for target in ("g02", "z"):
            training = Training(world, target, per_subject, prior_depth=1, hidden_size=1024)
            gpu.take()
            training.step(training.batch(), 0)
            counts = gpu.take()
            assert counts.cpu_collectives == []
            assert (counts.collectives.total() > 2) == (size > 1)
