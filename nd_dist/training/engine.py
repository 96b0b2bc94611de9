"""The DeepSpeed engine: the only file that imports deepspeed.

It owns the process groups, ZeRO, mixed precision, gradient accumulation and clipping, the optimizer and its schedule,
and DeepSpeed's part of a checkpoint. What is trained, and when things are saved, is decided elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

from nd_dist.config import TrainingConfig
from nd_dist.errors import CheckpointError, ConfigError, StorageError, WorldError
from nd_dist.models.decoder import VOXEL_PREFIX
from nd_dist.schema import Batch
from nd_dist.training.finite import raise_not_finite
from nd_dist.training.gather import Gather, gather_rows, identity
from nd_dist.training.objectives import Objective, StepInputs
from nd_dist.training.schedule import OneCycle
from nd_dist.world import World

ADAM_EPS = 1e-8
ADAM_BETA2 = 0.999
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


def deepspeed_config(training: TrainingConfig, rows_per_rank: int, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: derived here and nowhere else.

    Args:
        training: The recipe's training section.
        rows_per_rank: Rows of one micro-batch on one rank.
        world_size: Number of ranks.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "train_batch_size": rows_per_rank * world_size * training.gradient_accumulation,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if training.dtype == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if training.dtype == "float16":
        config["fp16"] = {"enabled": True}
    return config


def _check_precision(training: TrainingConfig) -> None:
    """Refuse half precision without ZeRO: DeepSpeed 0.19 then makes a dummy AdamW step at the start (its step count is
    one ahead of all other stages), and gradients that are not finite are skipped in silence.

    Raises:
        ConfigError: dtype and zero_stage are such a pair.
    """
    if training.zero_stage == 0 and training.dtype != "float32":
        raise ConfigError(
            "Half precision needs ZeRO.",
            where="training.dtype, training.zero_stage",
            expected="zero_stage 1, 2 or 3",
            found=f"{training.dtype} with zero_stage 0",
            todo="set training.zero_stage=1: the same memory in a world of one, less in a larger one",
        )


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
        total_steps: Optimizer steps of the stage.
        rows_per_rank: Rows of one micro-batch on one rank.
        world: Who this rank is; ``connect`` came first.
        timeout_s: Longest wait of a collective call.

    Raises:
        ConfigError: the device cannot train in the wanted precision.
    """

    def __init__(
        self,
        objective: Objective,
        training: TrainingConfig,
        total_steps: int,
        rows_per_rank: int,
        world: World,
        timeout_s: int,
    ) -> None:
        _check_precision(training)
        self.world, self.device, self.zero_stage = world, training_device(world), training.zero_stage
        self.dtype = _TORCH_DTYPES[training.dtype]
        self.objective, self._training = objective, training
        self._cycle = OneCycle(total_steps, training.learning_rate, training.warmup_fraction, training.cycle_momentum)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(objective, training.weight_decay), lr=training.learning_rate, eps=ADAM_EPS
        )
        try:
            self._engine: Any = deepspeed.initialize(  # Any: deepspeed has no types
                model=objective,
                optimizer=self._optimizer,
                config=deepspeed_config(training, rows_per_rank, world.size),
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
        return StepOutcome(terms, self._cycle.learning_rate(step), grad_norm, is_skipped, should_stop)

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
        """Let DeepSpeed update the parameters; return the gradient norm and whether the loss scaler skipped it.

        ZeRO computes the norm first and leaves the parameters alone where it is not finite; without ZeRO it is
        computed here.
        """
        is_plain = self.zero_stage == 0
        norm = self._plain_norm() if is_plain else math.nan
        if is_plain and not math.isfinite(norm):
            raise_not_finite("gradient", step, batches[-1], self.world, True)
        self._engine.step()
        if is_plain:
            return norm, False
        norm, was_applied = _as_float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()
        if was_applied and math.isfinite(norm) and norm >= 0:
            return norm, False
        if self.dtype == torch.float16:
            return math.nan, True
        raise_not_finite("gradient", step, batches[-1], self.world, True)

    def _plain_norm(self) -> float:
        """Return the global gradient norm without ZeRO: gradients are whole and equal on every rank."""
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _set_schedule(self, step: int) -> None:
        """Set the step's learning rate and beta1."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._cycle.learning_rate(step)
            group["betas"] = (self._cycle.beta1(step), ADAM_BETA2)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the decoder's whole state dict in float32 on the CPU on rank 0, an empty one elsewhere."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.objective.decoder.named_parameters():
            full = safe_get_full_fp32_param(parameter)  # collective under ZeRO; none where nothing is partitioned
            if self.world.is_main:
                value = parameter.detach() if full is None else full
                state[name] = value.to(device="cpu", dtype=torch.float32).view(_full_shape(parameter))
        return state

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's state of every rank to ``folder / tag``.

        Raises:
            StorageError: this rank could not write its part (disk full); the other ranks then fail in the barrier.
        """
        try:
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise StorageError(
                "A checkpoint could not be written; the one before is still valid.",
                where=f"{folder / tag}, rank {self.world.rank}",
                found=str(error).splitlines()[0],
                todo="free some space, then run the same command again: it continues from the last valid checkpoint",
            ) from error

    def load(self, folder: Path, tag: str) -> None:
        """Load DeepSpeed's state of every rank from ``folder / tag``.

        Raises:
            CheckpointError: DeepSpeed cannot read it.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError("DeepSpeed cannot read a checkpoint.", where=str(folder / tag))

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers; the engine cannot be used afterwards."""
        self._engine.destroy()


def parameter_groups(objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: no decay for names containing "bias", except in the voxel encoders.

    Source: the released rule; LayerNorm weights are decayed, as there.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in objective.decoder.named_parameters():
        (plain if "bias" in name and not name.startswith(VOXEL_PREFIX) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _as_float(norm: object) -> float:
    """Return DeepSpeed's norm (None, a number or a tensor) as a float; NaN where there is none."""
    return math.nan if norm is None else float(norm)  # type: ignore[arg-type]


def _full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the whole shape of a parameter, also where ZeRO 3 holds only a part of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
