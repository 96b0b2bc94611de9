"""The DeepSpeed engine: the only file that imports deepspeed.

It owns the process groups, ZeRO, mixed precision, gradient accumulation and clipping, the optimizer and its schedule,
and DeepSpeed's part of a checkpoint. What is trained, and when things are saved, is decided elsewhere.
"""

from __future__ import annotations

import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.utils import clip_grads_with_norm_

from nd_dist.config import TrainingConfig
from nd_dist.errors import CheckpointError, ConfigError, DataError, StorageError, WorldError
from nd_dist.schema import Batch
from nd_dist.training.collective import barrier, on_main
from nd_dist.training.engine.finite import raise_not_finite
from nd_dist.training.engine.shard_optimizer import ShardOptimizer
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.gather import Gather, gather_rows, identity
from nd_dist.training.objective.objectives import StepInputs, Trainable
from nd_dist.training.parameters import check_training, deepspeed_config
from nd_dist.training.schedule import Schedule
from nd_dist.training.source import StageRequest
from nd_dist.world import World

Monitor = Callable[[Sequence[tuple[str, float, int]]], None]
"""Takes (name, value, step) events; rank 0's are written."""

Objective = TypeVar("Objective", bound=Trainable, covariant=True)

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_device(world: World) -> torch.device:
    """Return this rank's device: its GPU where there is one, else the CPU.

    Some launchers show every rank of a host all GPUs, others each rank its own one alone.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", world.local_rank % torch.cuda.device_count())


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


class Engine(Generic[Objective]):
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
        objective: Objective,
        training: TrainingConfig,
        schedule: Schedule,
        request: StageRequest,
        world: World,
        timeout_s: int,
    ) -> None:
        check_training(training)
        self.world, self.device, self.zero_stage = world, training_device(world), training.zero_stage
        self.dtype = _TORCH_DTYPES[training.dtype]
        self.objective, self._training = objective, training
        self._schedule, rows = schedule, request.samples_per_subject * len(request.subjects)
        layers = {}
        if training.shard_layers:
            layers = shard_large_layers(objective.network, rows, request.samples_per_subject, world, self.device)
        self.is_sharded, self.sharded_layers = training.shard_layers, tuple(layers)
        self._shards = ShardOptimizer(layers, training, world, self.device)
        self._optimizer = objective.optimizer(training)
        self._weight_decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        try:
            self._engine: Any = deepspeed.initialize(  # Any: deepspeed has no types
                model=objective,
                optimizer=self._optimizer,
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
        self._set_schedule(step)
        summaries: list[dict[str, float]] = []
        for batch in batches:
            if summaries:
                self._engine.step()  # counts the micro-step before; only the last one updates
            summaries.append(self._micro_step(batch, step, stop_wanted))
        names = [name for name in summaries[0] if not name.startswith("_")]
        terms = {name: math.fsum(summary[name] for summary in summaries) / len(summaries) for name in names}
        grad_norm, is_skipped = self._finish_step(batches, step)
        should_stop = any(summary["_stop"] > 0 for summary in summaries)
        return StepOutcome(terms, self._schedule.learning_rate(step), grad_norm, is_skipped, should_stop)

    def _micro_step(self, batch: Batch, step: int, stop_wanted: bool) -> dict[str, float]:
        """Run forward and backward of one batch; return the terms' means over ranks and ``_stop``."""
        inputs = StepInputs.of(batch, self.device, self.dtype)
        loss, terms = self._engine(inputs, step)
        is_bad = not bool(torch.isfinite(loss.detach()))
        local = [*(value.double() for value in terms.values()), *self._flags(is_bad, stop_wanted)]
        totals = torch.stack(local)
        distributed.all_reduce(totals)
        *sums, num_bad, num_stop = totals.tolist()
        if num_bad > 0:
            raise_not_finite("loss", step, batch, self.world, is_bad)
        self._engine.backward(loss)
        means = {name: total / self.world.size for name, total in zip(terms, sums, strict=True)}
        return {**means, "_stop": num_stop}

    def _flags(self, *flags: bool) -> list[torch.Tensor]:
        """Return flags as float64 numbers on the training device."""
        return [torch.tensor(float(flag), dtype=torch.float64, device=self.device) for flag in flags]

    def _finish_step(self, batches: Sequence[Batch], step: int) -> tuple[float, bool]:
        """Update the parameters; return the gradient norm and whether the loss scaler skipped it.

        ZeRO computes the norm first and leaves the parameters alone where it is not finite; without ZeRO, and of
        sharded layers, it is computed here, and gradients without ZeRO are clipped here.
        """
        is_plain, shard_norm = self.zero_stage == 0, self._shards.norm()
        norm = self._plain_norm() if is_plain else 0.0
        if not math.isfinite(norm + shard_norm):
            raise_not_finite("gradient", step, batches[-1], self.world, True)
        if is_plain and self._training.gradient_clip > 0:
            total = torch.tensor(norm, device=self.device)
            clip_grads_with_norm_(self.objective.parameters(), self._training.gradient_clip, total)
        self._engine.step()
        if not is_plain:
            norm = _as_float(self._engine.get_global_grad_norm())
        if is_plain or (self._engine.was_step_applied() and math.isfinite(norm) and norm >= 0):
            self._shards.step(self._schedule.learning_rate(step), self._schedule.betas(step))
            return math.hypot(norm, shard_norm), False
        if self.dtype == torch.float16:
            return math.nan, True
        raise_not_finite("gradient", step, batches[-1], self.world, True)

    def _plain_norm(self) -> float:
        """Return the global gradient norm without ZeRO: gradients are whole and equal on every rank."""
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _set_schedule(self, step: int) -> None:
        """Set the step's learning rate and betas."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate(step)
            group["betas"] = self._schedule.betas(step)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the network's whole state dict in float32 on the CPU on rank 0, an empty one elsewhere."""
        state = self._shards.whole()
        for name, parameter in self.objective.network.named_parameters():
            full = safe_get_full_fp32_param(parameter)  # collective under ZeRO; none where nothing is partitioned
            if self.world.is_main:
                value = parameter.detach() if full is None else full
                state[name] = value.to(device="cpu", dtype=torch.float32).view(_full_shape(parameter))
        return state

    def save(self, folder: Path, tag: str) -> None:
        """Write the state of every rank to ``folder / tag``.

        Raises:
            StorageError: this rank could not write its part (disk full); the other ranks then fail in the barrier.
        """
        try:
            self._shards.save(folder / tag)
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        except (OSError, RuntimeError, DataError) as error:  # torch.save reports a full disk as RuntimeError
            raise StorageError(
                "A checkpoint could not be written; the one before is still valid.",
                where=f"{folder / tag}, rank {self.world.rank}",
                found=_cause(error, folder),
                todo="free some space, then run the same command again: it continues from the last valid checkpoint",
            ) from error
        barrier()  # the files of all ranks are there: they are hashed next

    @property
    def layout(self) -> dict[str, Any]:
        """What the files of a checkpoint depend on besides the recipe."""
        return {"world_size": self.world.size, "zero_stage": self.zero_stage, "shard_layers": self.is_sharded}

    def can_load(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of this layout can be read: any number of ranks, ZeRO 1 and 2 in exchange."""
        stages = {self.zero_stage, saved["zero_stage"]}
        return saved["shard_layers"] == self.is_sharded and (len(stages) == 1 or stages == {1, 2})

    def load(self, folder: Path, tag: str, saved: Mapping[str, Any]) -> None:
        """Load the state of every rank from ``folder / tag``, which ranks of the ``saved`` layout wrote.

        Raises:
            CheckpointError: DeepSpeed cannot read it.
        """
        if saved == self.layout or self.zero_stage == 0:
            self._load_deepspeed(folder, tag)
        else:  # ZeRO's files are those of one world; DeepSpeed's universal format is any world's
            universal = f"universal-{tag}"
            on_main(lambda: _convert(folder / tag, folder / universal))
            self._engine._config.load_universal_checkpoint = True
            self._load_deepspeed(folder, universal)
            self._engine._config.load_universal_checkpoint = False
            on_main(lambda: shutil.rmtree(folder / universal))
        for group, weight_decay in zip(self._optimizer.param_groups, self._weight_decays, strict=True):
            group["weight_decay"] = weight_decay  # ZeRO 3 gives all groups the first one's when it reads universal
        for state in self._optimizer.state.values():  # read to the CPU, and fused AdamW wants its count on the device
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=self.device)
        self._shards.load(folder / tag, saved["world_size"])

    def _load_deepspeed(self, folder: Path, tag: str) -> None:
        """Load DeepSpeed's state; the schedule is this project's."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError("DeepSpeed cannot read a checkpoint.", where=str(folder / tag))

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self._engine.destroy()


def _convert(source: Path, target: Path) -> None:
    """Write a checkpoint of ZeRO 1 to 3 in DeepSpeed's universal format, which any number of ranks reads (rank 0).

    Raises:
        CheckpointError: DeepSpeed cannot convert it, or the disk is full.
    """
    shutil.rmtree(target, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: forking one that computes with threads can hang
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    target.mkdir()
    try:
        ds_to_universal.main(options)
    except (AssertionError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            "A checkpoint cannot be converted for another number of ranks.",
            where=str(source),
            found=f"{type(error).__name__}: {error}",
            todo="continue with the number of ranks that saved it",
        ) from error
    (target.parent / "latest_universal").unlink()


def open_monitor(training: TrainingConfig, run_dir: Path, stage: int) -> Monitor:
    """Return what takes (name, value, step) events to the recipe's monitors; every rank calls it.

    Raises:
        ConfigError: a monitor's package is not installed.
    """
    if not training.monitors:
        return _no_monitor
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


def _no_monitor(events: Sequence[tuple[str, float, int]]) -> None:
    """Take the events where no monitor was asked for."""


def _cause(error: Exception, folder: Path) -> str:
    """Return why a file could not be written; torch's own writer does not say that the disk is full."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, DataError):
        return error.found or error.what
    free = shutil.disk_usage(folder).free
    return f"{str(error).splitlines()[0]} ({free / 1e6:.1f} MB free in that folder)"


def _as_float(norm: object) -> float:
    """Return DeepSpeed's norm (None, a number or a tensor) as a float; NaN where there is none."""
    return math.nan if norm is None else float(norm)  # type: ignore[arg-type]


def _full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the whole shape of a parameter, also where ZeRO 3 holds only a part of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
