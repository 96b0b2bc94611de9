"""A training step of the published decoders at h=4096, its validation, and collective calls on several ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.training_memory import SHAPES, VOXELS
from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import Batch, TargetSpec, role_of
from nd_dist.training.engine import engine
from nd_dist.training.engine.engine import Engine, LaunchedStep
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.objective.objectives import Objective, StepInputs
from nd_dist.training.ranks import GlobalRows, gather_rows, identity
from nd_dist.training.schedule import OneCycle
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


class PlainDeepSpeed:
    """Stands in for DeepSpeed, which asks the real driver: one replica and no copies of the weights."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        self._objective, self._update, self.optimizer = objective, optimizer, self

    def __call__(self, inputs: StepInputs, step: int) -> Any:
        return self._objective(inputs, step)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._objective.parameters() if p.grad is not None])

    def step(self) -> None:
        self.scaled_global_norm()
        self._update.step()
        self._update.zero_grad(set_to_none=False)


class Training:
    """A training in stage 1 as one rank has it."""

    def __init__(self, world: World, target: str, per_subject: int = 6, **decoder: int) -> None:
        self.world, self.target = world, target
        training = TrainingConfig(dtype="bfloat16", targets=(target,), quirks="official")
        with torch.device("cuda"):
            specs = [TargetSpec(target, role_of(target), SHAPES[target])]
            voxels = {subject: VOXELS[subject] for subject in SUBJECTS}
            self.decoder = Decoder(DecoderConfig(heads="single", **decoder), voxels, specs)
        num_rows = per_subject * len(SUBJECTS)
        self.rows = GlobalRows(num_rows, world, identity if world.size == 1 else gather_rows)
        layers = shard_large_layers(self.decoder, num_rows, world, CUDA)
        self.decoder.to(torch.bfloat16)
        objective = Objective(self.decoder, training, STEPS, 42, self.rows)

        def initialize(model: Objective, optimizer: torch.optim.Optimizer, config: object) -> list[PlainDeepSpeed]:
            return [PlainDeepSpeed(model, optimizer)]

        with mock.patch("deepspeed.initialize", initialize), mock.patch.object(engine, "bound_waits"):
            schedule = OneCycle(STEPS, 3e-4, 0.1, cycle_momentum=False)
            self._engine = Engine(objective, training, schedule, self.rows.per_rank, world, 60, layers)

    def batch(self) -> Batch:
        """Return this rank's rows in page-locked memory of the host, as the stream hands them out."""
        per_subject = self.rows.num // len(SUBJECTS)
        ids = np.arange(self.world.rank, self.rows.num, self.world.size)
        num = dict(zip(SUBJECTS, np.bincount(ids // per_subject, minlength=len(SUBJECTS)).tolist(), strict=True))
        voxels = {
            subject: torch.ones(num[subject], VOXELS[subject], dtype=torch.float16, pin_memory=True)
            for subject in SUBJECTS
        }
        shape = (len(ids), *SHAPES[self.target])
        targets = {self.target: torch.ones(shape, dtype=torch.float16, pin_memory=True)}
        return Batch(0, voxels, targets, *[ids] * 5, sample_id=ids)

    def step(self, batch: Batch, step: int) -> LaunchedStep:
        """Launch one optimizer step."""
        return self._engine.train_step([batch], step, {"stop": False})


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
        assert not counts.waits, "the host waits in a step"
        budget.check(f"train {target}, {'' if target == 'z' else phase + ', '}42 rows", gpu.cost(counts))
        assert set(counts.irreproducible) <= IRREPRODUCIBLE, "docs/gpu.md lists what may differ between two runs"
        if (target, phase) == ("c", "SoftCLIP"):
            validate(gpu, budget, training)


class TestImages:
    """A source of as many test images as a chunk of the validation has."""

    specs: tuple[TargetSpec, ...] = ()
    __test__ = False

    def validation_images(self, subject: int) -> tuple[str, list[int]]:
        return "test", list(range(25))

    def validation_trials(
        self, subject: int, image_ids: Sequence[int], targets: Sequence[str]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        rows = len(image_ids)
        return torch.ones(rows, REPEATS, VOXELS[subject]), {name: torch.ones(rows, *SHAPES[name]) for name in targets}


def validate(gpu: PretendedGpu, budget: Budget, training: Training) -> None:
    gpu.reset_peak()
    config = TrainingConfig(targets=(training.target,))
    validation = Validation(TestImages(), SUBJECTS[0], config, training.world, identity, {})  # type: ignore[arg-type]
    assert "loss" in validation(training.decoder)
    budget.check("validate c, 25 images", gpu.cost(gpu.take()))


@pytest.mark.parametrize("size", [1, 2, 6, 8])
def test_collective_calls_get_no_tensor_of_the_cpu(gpu: PretendedGpu, size: int) -> None:
    with ranks(size) as world:
        for target in ("g02", "z"):
            training = Training(world, target, prior_depth=1, hidden_size=1024)
            gpu.take()
            training.step(training.batch(), 0)
            counts = gpu.take()
            assert counts.cpu_collectives == []
            assert (counts.collectives.total() > 2) == (size > 1)
