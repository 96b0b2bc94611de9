"""The DeepSpeed engine: process groups, ZeRO, mixed precision, gradient accumulation and clipping, the optimizer.

Only this file imports deepspeed. What is trained, and when things are saved, is decided elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.checkpoint.ds_to_universal import main as write_universal
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.utils import safe_get_full_fp32_param as full_parameter
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

from nd_dist.compute.device import DTYPES, rank_device, sent
from nd_dist.config import TrainingConfig
from nd_dist.errors import ConfigError, WorldError
from nd_dist.schema import Batch
from nd_dist.training.engine.shard_optimizer import ShardOptimizer
from nd_dist.training.engine.sharded import OwnColumns
from nd_dist.training.objective.objectives import TOTAL, Trainable
from nd_dist.training.parameters import deepspeed_config
from nd_dist.training.ranks import Gather, gather_rows, identity, raise_not_finite
from nd_dist.training.schedule import Schedule
from nd_dist.world import World

__all__ = ["Engine", "Monitor", "connect", "full_parameter", "write_universal"]

Monitor = Callable[[Sequence[tuple[str, float, int]]], None]
"""Takes (name, value, step) events; rank 0's are written."""


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
    device = rank_device(world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed would compile a shared-memory extension on first use on the CPU: half a minute, and a process killed
    # meanwhile leaves a lock on which every later run hangs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it, whoever launched the rank
    where: dict[str, Any] = {"store": HashStore()} if world.size == 1 else {"init_method": "env://"}
    if device.type == "cuda":
        where["device_id"] = device  # NCCL otherwise guesses one from the rank, and connects at the first call
    distributed.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout, **where)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def bound_waits(timeout_s: int) -> None:
    """Give every process group the time-out; DeepSpeed makes its own groups with torch's default of 10 or 30 min."""
    # private API of torch (no public one changes the time-out of an existing group); a test pins it
    for group in list(distributed.distributed_c10d._world.pg_map):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


class StepOutcome(NamedTuple):
    """What an optimizer step did.

    Args:
        terms: Loss terms, means over ranks and micro-steps.
        flags: Number of ranks that raised each flag when the step was launched.
        learning_rate: The step's learning rate.
        grad_norm: Global gradient norm before clipping; NaN where float16 skipped the step.
        is_skipped: Whether the loss scaler skipped the update (float16 only).
    """

    terms: Mapping[str, float]
    flags: Mapping[str, int]
    learning_rate: float
    grad_norm: float
    is_skipped: bool


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still be busy with; its numbers are on their way to the host.

    Args:
        step: 0-based optimizer step.
        batches: This rank's micro-batches; held, because the device may not have copied their memory yet.
        names: Of the terms, and of the flags.
        values: On the host: means of the terms, numbers of the flags, gradient norm, and whether the own loss of each
            micro-batch is finite.
        arrived: When they are there; none: they are.
        learning_rate: The step's learning rate.
        may_skip: Whether an infinite gradient is no fault (float16).
    """

    step: int
    batches: Sequence[Batch]
    names: tuple[Sequence[str], Sequence[str]]
    values: torch.Tensor
    arrived: torch.cuda.Event | None
    learning_rate: float
    may_skip: bool

    def read(self) -> StepOutcome:
        """Wait for the step and return what it did; every rank reads its steps in the same order.

        Raises:
            NonFiniteError: on every rank, where a loss or gradient is not finite; the step changed no parameter.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        values, (terms, flags) = iter(self.values.tolist()), self.names
        of_terms = {name: next(values) for name in terms}
        of_flags = {name: round(next(values)) for name in flags}
        norm, *is_finite = values
        if not math.isfinite(of_terms[TOTAL]):
            blamed = [batch for batch, fine in zip(self.batches, is_finite, strict=True) if not fine]
            raise_not_finite("loss", self.step, blamed)
        is_skipped = not math.isfinite(norm)
        if is_skipped and not self.may_skip:
            raise_not_finite("gradient", self.step, self.batches)
        return StepOutcome(of_terms, of_flags, self.learning_rate, math.nan if is_skipped else norm, is_skipped)


def _fetched(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Return values of a device on the host, and when they have arrived there."""
    if not values.is_cuda:
        return values, None
    host, arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
    host.copy_(values, non_blocking=True)
    arrived.record()
    return host, arrived


class Engine:
    """Trains an objective over all ranks. Every rank makes the same calls in the same order.

    The host launches a step and does not wait for it: whether it was finite is decided on the device, where AdamW then
    leaves the parameters alone, and read while the next step runs.

    Args:
        objective: Module whose forward is the loss; in float32 when given.
        training: The recipe's training section.
        schedule: Learning rate and betas of every step.
        rows_per_rank: Rows of a micro-batch on one rank.
        world: Who this rank is; ``connect`` came first.
        timeout_s: Longest wait of a collective call.
        layers: Layers of the network that are divided among the ranks, by name.

    Raises:
        ConfigError: the device cannot train in the wanted precision, or DeepSpeed refuses a setting.
    """

    def __init__(
        self,
        objective: Trainable,
        training: TrainingConfig,
        schedule: Schedule,
        rows_per_rank: int,
        world: World,
        timeout_s: int,
        layers: Mapping[str, OwnColumns] | None = None,
    ) -> None:
        self.objective, self.training, self.world, self.device = objective, training, world, rank_device(world)
        self._schedule, self._dtype = schedule, DTYPES[training.dtype]
        self.shards = ShardOptimizer(layers or {}, training, world, self.device)
        self.optimizer = objective.optimizer(training)
        try:
            self.deepspeed: Any = deepspeed.initialize(  # Any: deepspeed has no types
                model=objective,
                optimizer=self.optimizer,
                config=deepspeed_config(training, rows_per_rank, world.size),
            )[0]
        except ValueError as error:
            raise ConfigError(
                "DeepSpeed refuses the recipe on this device.",
                where="training.dtype, training.zero_stage, training.deepspeed",
                found=str(error),
                todo="change what it names; float32 trains everywhere",
            ) from error
        bound_waits(timeout_s)
        self._has_failed = torch.zeros((), dtype=torch.bool, device=self.device)
        self._norm = self._loss = torch.zeros((), device=self.device)
        zero = self.deepspeed.optimizer
        if training.zero_stage == 3:
            own_norms = zero._get_norm_groups
            zero._get_norm_groups = lambda: [self._whole_norm(_joined(own_norms()))]
        elif training.zero_stage > 0:
            own_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda norm_type=2: self._whole_norm(own_norm(norm_type))

    def train_step(self, batches: Sequence[Batch], step: int, flags: Mapping[str, bool]) -> LaunchedStep:
        """Launch one optimizer step of ``gradient_accumulation`` batches.

        Args:
            batches: This rank's micro-batches.
            step: 0-based optimizer step.
            flags: What all ranks are to hear of this one; the outcome counts the ranks that raised each.
        """
        learning_rate, betas = self._schedule(step)
        for optimizer in (self.optimizer, *self.shards.optimizers):
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = learning_rate * group.get("rate_share", 1.0), betas
        told: list[torch.Tensor] = []
        for number, batch in enumerate(batches):
            if number:
                self.deepspeed.step()  # counts the micro-step before; only the last one updates
            loss, terms = self.deepspeed(self.objective.prepare(batch, step, self.device, self._dtype), step)
            told.append(torch.stack([value.double() for value in terms.values()]))
            self.deepspeed.backward(loss)
        own_TM, place = torch.stack(told, dim=1), list(terms).index(TOTAL)
        raised = torch.tensor([float(flag) * self.world.size for flag in flags.values()], dtype=torch.float64)
        means = torch.cat([own_TM.mean(dim=1), sent(raised, self.device)])
        if self.world.size > 1:
            distributed.all_reduce(means)
            means /= self.world.size
        self._update(means[place])
        values = torch.cat([means, self._norm.double().view(1), torch.isfinite(own_TM[place]).double()])
        names = (tuple(terms), tuple(flags))
        return LaunchedStep(step, batches, names, *_fetched(values), learning_rate, self._dtype == torch.float16)

    def _update(self, loss: torch.Tensor) -> None:
        """Update the parameters, on the condition that loss and gradients are finite."""
        self._loss, self._norm = loss, torch.full_like(self._norm, math.inf)
        for optimizer in (self.optimizer, *self.shards.optimizers):
            vars(optimizer).update(found_inf=torch.ones((), device=self.device))  # until ``_whole_norm`` decides
        if self.training.zero_stage == 0:  # gradients are whole and equal on every rank
            gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
            self._whole_norm(torch.nn.utils.get_total_norm(gradients))
        self.deepspeed.step()
        self.shards.step()

    def _whole_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """Return the norm of all gradients and tell both optimizers what to do with them.

        torch's fused AdamW divides gradients by ``grad_scale`` and does nothing where ``found_inf`` is 1, on the
        device: clipping costs no pass over memory, and nobody waits for the norm.

        Args:
            norm: That of DeepSpeed's own parameters, times the loss scale, as the result is.
        """
        scale = float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0)) if self._dtype == torch.float16 else 1.0
        whole = torch.hypot(norm.to(self.device).float(), self.shards.norm())
        self._norm, limit = whole / scale, self.training.gradient_clip
        is_bad = ~(torch.isfinite(whole) & torch.isfinite(self._loss))
        if self._dtype != torch.float16:  # there the loss scale was too large, and the next step has a smaller one
            is_bad = self._has_failed = self._has_failed | is_bad
        divisor = ((self._norm + 1e-6) / limit).clamp(min=1.0) if limit > 0 else torch.ones_like(self._norm)
        for optimizer, own_scale in ((self.optimizer, 1.0), *((o, scale) for o in self.shards.optimizers)):
            is_divided = limit > 0 or own_scale != 1.0
            vars(optimizer).update(found_inf=is_bad.float(), grad_scale=divisor * own_scale if is_divided else None)
        return whole

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self.deepspeed.destroy()


def _joined(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of several parts; DeepSpeed writes -1 for one that is not finite."""
    each = torch.stack([norm.float() for norm in norms])
    return torch.where(each < 0, math.inf, each).square().sum().sqrt()


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
