"""The training loop of one stage: batches -> objective -> engine -> events -> checkpoint; reads as the stage runs."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nd_dist.config import TrainingConfig
from nd_dist.errors import Requeue
from nd_dist.events import EventLog
from nd_dist.schema import Batch
from nd_dist.training.checkpoints import Progress, StageCheckpoints
from nd_dist.training.engine.engine import Engine, Monitor, StepOutcome
from nd_dist.training.objective.objectives import TOTAL, Trainable
from nd_dist.training.source import Stream

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What the loop asks and tells beside training. Every rank calls ``validate`` and ``keep_best`` alike.

    Args:
        should_stop: Whether this rank was asked to save and stop.
        validate: Returns named numbers of the model (``loss`` among them), equal on every rank; none: no validation.
        keep_best: Keeps the model as the best one so far: the steps made, and what the validation found.
        monitor: Takes the curves.
        after_step: Called after every step (the profiler).
    """

    should_stop: Callable[[], bool]
    validate: Callable[[], Mapping[str, float]] | None
    keep_best: Callable[[int, Mapping[str, float]], None]
    monitor: Monitor
    after_step: Callable[[], None]


@dataclass(frozen=True)
class StagePlan:
    """How long a stage trains and how often it reports.

    Args:
        stage: 1 or 2, or what else is trained: a name.
        total_steps: Optimizer steps.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations.
        early_stop: Validations without a better one after which the stage ends; 0: never.
        gradient_accumulation: Batches of one optimizer step.
    """

    stage: int | str
    total_steps: int
    checkpoint_every: int
    validate_every: int
    early_stop: int
    gradient_accumulation: int

    @staticmethod
    def of(training: TrainingConfig, stage: int) -> StagePlan:
        """Return the plan of a stage of a recipe."""
        return StagePlan(
            stage,
            training.steps[stage - 1],
            training.checkpoint_every,
            training.validate_every,
            training.early_stop,
            training.gradient_accumulation,
        )

    def is_over(self, progress: Progress) -> bool:
        """Whether the stage ends here: at its last step, or early."""
        is_stale = self.early_stop > 0 and progress.stale >= self.early_stop
        return is_stale or progress.step >= self.total_steps


def train_stage(
    plan: StagePlan,
    engine: Engine[Trainable],
    stream: Stream,
    checkpoints: StageCheckpoints,
    events: EventLog,
    hooks: Hooks,
) -> Progress:
    """Train one stage from its newest checkpoint to its end. Every rank calls it.

    Returns:
        Where the stage ended.

    Raises:
        Requeue: a rank was asked to stop; the state is saved and the same command continues.
        NonFiniteError: a loss or gradient is not finite; no parameter was changed by that step.
        CheckpointError: the newest checkpoint is of another recipe, or a checkpoint could not be written.
    """
    # Continue where the newest valid checkpoint stopped
    progress = checkpoints.load_newest()
    stream.load_state_dict({**stream.state_dict(), "step": progress.step * plan.gradient_accumulation})
    batches = iter(stream)
    first = progress.step
    events.progress(_task(plan), first, plan.total_steps)

    while not plan.is_over(progress):
        # One optimizer step
        step, started = progress.step, time.monotonic()
        micro_batches = [next(batches) for _ in range(plan.gradient_accumulation)]
        if step == first:
            shapes = batch_facts(micro_batches[0])
            events.write("first_batch", stage=plan.stage, **shapes)
            _LOGGER.info("stage %s: this rank's first batch %s", plan.stage, shapes)
        outcome = engine.train_step(micro_batches, step, hooks.should_stop())
        progress = progress._replace(step=step + 1, loss=outcome.terms[TOTAL])

        # What it did
        facts = step_facts(micro_batches, outcome, engine, time.monotonic() - started)
        events.write("train_step", stage=plan.stage, step=step, **facts)
        events.progress(_task(plan), progress.step, plan.total_steps, loss=progress.loss)
        hooks.monitor(curves("train", {**outcome.terms, **_numbers_of(facts)}, progress.step))
        hooks.after_step()

        # Look at it, keep it
        if hooks.validate is not None and (plan.is_over(progress) or progress.step % plan.validate_every == 0):
            progress = _validated(progress, plan, hooks.validate(), events, hooks)
        is_over = plan.is_over(progress)
        if is_over or outcome.should_stop or progress.step % plan.checkpoint_every == 0:
            checkpoints.save(progress)
        if outcome.should_stop and not is_over:
            raise _requeue(plan, progress.step)
    return progress


def _validated(
    progress: Progress, plan: StagePlan, found: Mapping[str, float], events: EventLog, hooks: Hooks
) -> Progress:
    """Report a validation, keep the model if it is the best so far, and return the progress that knows of it."""
    events.write("validation", stage=plan.stage, step=progress.step, values=dict(found))
    hooks.monitor(curves("validation", found, progress.step))
    is_better = math.isfinite(found[TOTAL]) and (progress.best is None or found[TOTAL] < progress.best)
    if not is_better:
        return progress._replace(stale=progress.stale + 1)
    hooks.keep_best(progress.step, found)
    return progress._replace(best=found[TOTAL], stale=0)


def curves(group: str, values: Mapping[str, float], step: int) -> list[tuple[str, float, int]]:
    """Return the events of a monitor: name, value, optimizer steps made."""
    return [(f"{group}/{name}", value, step) for name, value in values.items()]


def _numbers_of(facts: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers among the facts of a step."""
    return {name: float(value) for name, value in facts.items() if isinstance(value, float | int)}


def _task(plan: StagePlan) -> str:
    """Return the progress bar's name."""
    return f"stage {plan.stage}" if isinstance(plan.stage, int) else plan.stage


def _requeue(plan: StagePlan, step: int) -> Requeue:
    """Return the error that says: saved, start me again."""
    return Requeue(
        "Training was asked to stop and has saved its state.",
        where=f"{_task(plan)}, step {step} of {plan.total_steps}",
        todo="run the same command again; it continues from here",
    )


def step_facts(
    batches: list[Batch], outcome: StepOutcome, engine: Engine[Trainable], seconds: float
) -> dict[str, object]:
    """Return the fields of a ``train_step`` event."""
    rows = sum(len(batch) for batch in batches)
    return {
        "loss": outcome.terms[TOTAL],
        "terms": {name: value for name, value in outcome.terms.items() if name != TOTAL},
        "learning_rate": outcome.learning_rate,
        "grad_norm": outcome.grad_norm,
        "is_skipped": outcome.is_skipped,
        "step_s": round(seconds, 6),
        "samples_per_s": round(rows * engine.world.size / seconds, 3),
        "data_wait_share": round(min(1.0, sum(batch.data_wait_s for batch in batches) / seconds), 6),
        "memory_bytes": peak_memory_bytes(engine.device),
    }


def batch_facts(batch: Batch) -> dict[str, object]:
    """Return the shapes of a batch, for the first one's event."""
    return {
        "rows": len(batch),
        "voxels": {str(subject): list(voxels.shape) for subject, voxels in batch.voxels.items()},
        "targets": {name: list(target.shape) for name, target in batch.targets.items()},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank: allocated GPU memory, or the process's resident set on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
