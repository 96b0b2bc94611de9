"""The DeepSpeed engine: process groups, ZeRO, mixed precision, gradient accumulation and clipping, the optimizer.

Only this file imports deepspeed. What is trained, and when things are saved, is decided elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.ds_to_universal import main as write_universal
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.utils import safe_get_full_fp32_param as full_parameter
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.utils import clip_grads_with_norm_

from nd_dist.config import TrainingConfig
from nd_dist.errors import ConfigError, WorldError
from nd_dist.schema import Batch
from nd_dist.training.engine.shard_optimizer import ShardOptimizer
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.objective.objectives import StepInputs, Trainable
from nd_dist.training.parameters import check_training, deepspeed_config
from nd_dist.training.ranks import Gather, gather_rows, identity, raise_not_finite
from nd_dist.training.schedule import Schedule
from nd_dist.training.source import StageRequest
from nd_dist.world import World

__all__ = ["Engine", "Monitor", "connect", "full_parameter", "training_device", "write_universal"]

Monitor = Callable[[Sequence[tuple[str, float, int]]], None]
"""Takes (name, value, step) events; rank 0's are written."""

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_device(world: World) -> torch.device:
    """Return this rank's device: its GPU where there is one, else the CPU."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def connect(world: World, timeout_s: int) -> Gather:
    """Join the ranks of the world that the launcher described and return how rows are gathered over them.

    A world of one needs no launcher. Every rank calls it; a second call returns at once.

    Raises:
        WorldError: another number of ranks joined.
    """
    if not distributed.is_initialized():
        _join(world, timedelta(seconds=timeout_s))
    if distributed.get_world_size() != world.size:
        raise WorldError(
            "The ranks that joined are not the launcher's world.",
            expected=world.size,
            found=distributed.get_world_size(),
        )
    return identity if world.size == 1 else gather_rows


def _join(world: World, timeout: timedelta) -> None:
    """Initialise torch.distributed and let DeepSpeed use it."""
    device = training_device(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed would compile a shared-memory extension on first use on the CPU: half a minute, and a process killed
    # meanwhile leaves a lock on which every later run hangs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it, whoever launched the rank
    where: dict[str, Any] = {"store": HashStore()} if world.size == 1 else {"init_method": "env://"}
    distributed.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout, **where)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def bound_waits(timeout_s: int) -> None:
    """Give every process group the time-out; DeepSpeed makes its own groups with torch's default of 10 or 30 min."""
    # private API of torch (no public one changes the time-out of an existing group); a test pins it
    for group in list(distributed.distributed_c10d._world.pg_map):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Args:
        terms: Loss terms, means over ranks and micro-steps.
        learning_rate: The step's learning rate.
        grad_norm: Global gradient norm before clipping; NaN where float16 skipped the step.
        is_skipped: Whether the loss scaler skipped the update (float16 only).
        should_stop: Whether any rank was asked to stop.
    """

    terms: dict[str, float]
    learning_rate: float
    grad_norm: float
    is_skipped: bool
    should_stop: bool


class Engine:
    """Trains an objective over all ranks. Every rank makes the same calls in the same order.

    Args:
        objective: Module whose forward is the loss; on the CPU in float32 when given.
        training: The recipe's training section.
        schedule: Learning rate and betas of every step.
        request: The stage's stream: how many rows a micro-batch has.
        world: Who this rank is; ``connect`` came first.
        timeout_s: Longest wait of a collective call.

    Raises:
        ConfigError: the device cannot train in the wanted precision.
    """

    def __init__(
        self,
        objective: Trainable,
        training: TrainingConfig,
        schedule: Schedule,
        request: StageRequest,
        world: World,
        timeout_s: int,
    ) -> None:
        check_training(training)
        self.objective, self.training, self.world, self.device = objective, training, world, training_device(world)
        self._schedule, self._dtype = schedule, _TORCH_DTYPES[training.dtype]
        rows, layers = request.samples_per_subject * len(request.subjects), {}
        if training.shard_layers:
            layers = shard_large_layers(objective.network, rows, request.samples_per_subject, world, self.device)
        self.sharded_layers = tuple(layers)
        self.shards = ShardOptimizer(layers, training, world, self.device)
        self.optimizer = objective.optimizer(training)
        try:
            self.deepspeed: Any = deepspeed.initialize(  # Any: deepspeed has no types
                model=objective,
                optimizer=self.optimizer,
                config=deepspeed_config(training, rows // world.size, world.size),
            )[0]
        except ValueError as error:
            raise ConfigError(
                "DeepSpeed refuses the recipe on this device.",
                where=f"training.dtype={training.dtype}, training.zero_stage={training.zero_stage}",
                found=str(error),
                todo="train in bfloat16 or float32",
            ) from error
        bound_waits(timeout_s)

    def train_step(self, batches: Sequence[Batch], step: int, stop_wanted: bool) -> StepOutcome:
        """Make one optimizer step from ``gradient_accumulation`` batches.

        Args:
            batches: This rank's micro-batches.
            step: 0-based optimizer step.
            stop_wanted: Whether this rank was asked to stop; the outcome tells all ranks.

        Raises:
            NonFiniteError: on every rank, before any parameter changed, where a loss or gradient is not finite.
        """
        learning_rate, betas = self._schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = learning_rate, betas
        means: list[list[float]] = []  # of every micro-step, over ranks: the terms, then both flags
        for batch in batches:
            if means:
                self.deepspeed.step()  # counts the micro-step before; only the last one updates
            loss, terms = self.deepspeed(StepInputs.of(batch, self.device, self._dtype), step)
            is_bad = not bool(torch.isfinite(loss.detach()))
            flags = torch.tensor([is_bad, stop_wanted], dtype=torch.float64, device=self.device)
            totals = torch.cat([torch.stack([value.double() for value in terms.values()]), flags])
            distributed.all_reduce(totals)
            means.append([total / self.world.size for total in totals.tolist()])
            if means[-1][-2] > 0:
                raise_not_finite("loss", step, batch, is_bad)
            self.deepspeed.backward(loss)
        *values, _, stops = (math.fsum(column) / len(batches) for column in zip(*means, strict=True))
        grad_norm, is_skipped = self._update(batches[-1], step)
        return StepOutcome(dict(zip(terms, values, strict=True)), learning_rate, grad_norm, is_skipped, stops > 0)

    def _update(self, batch: Batch, step: int) -> tuple[float, bool]:
        """Update the parameters; return the gradient norm and whether the loss scaler skipped it.

        ZeRO computes the norm first and leaves the parameters alone where it is not finite; without ZeRO, and of
        sharded layers, it is computed here, and gradients without ZeRO are clipped here.
        """
        is_plain, shard_norm, norm = self.training.zero_stage == 0, self.shards.norm(), 0.0
        if is_plain:  # gradients are whole and equal on every rank
            gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm + shard_norm):
            raise_not_finite("gradient", step, batch, True)
        if is_plain and self.training.gradient_clip > 0:
            total = torch.tensor(norm, device=self.device)
            clip_grads_with_norm_(self.objective.parameters(), self.training.gradient_clip, total)
        self.deepspeed.step()
        if not is_plain:
            found = self.deepspeed.get_global_grad_norm()  # none, a number or a tensor
            norm = math.nan if found is None else float(found)
        if is_plain or (self.deepspeed.was_step_applied() and math.isfinite(norm) and norm >= 0):
            self.shards.step(*self._schedule(step))
            return math.hypot(norm, shard_norm), False
        if self._dtype == torch.float16:
            return math.nan, True
        raise_not_finite("gradient", step, batch, True)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self.deepspeed.destroy()


def open_monitor(training: TrainingConfig, run_dir: Path, stage: int) -> Monitor:
    """Return what takes (name, value, step) events to the recipe's monitors; every rank calls it.

    Raises:
        ConfigError: a monitor's package is not installed.
    """
    if not training.monitors:
        return lambda events: None
    folder, job = str(run_dir / "monitor"), f"stage{stage}"
    sections: dict[str, dict[str, object]] = {
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": job},
        "csv": {"enabled": True, "output_path": folder, "job_name": job},
        "wandb": {"enabled": True, "project": "nd_dist", "group": f"{run_dir.name}-{job}"},
    }
    chosen = {"csv_monitor" if name == "csv" else name: sections[name] for name in training.monitors}
    try:
        master = MonitorMaster(get_monitor_config(chosen))
    except ImportError as error:
        raise ConfigError(
            "A monitor's package is not installed.",
            where=f"training.monitors={list(training.monitors)}",
            found=str(error),
            todo='pip install "nd-dist[track]", or leave it out',
        ) from error
    return lambda events: master.write_events(list(events))
