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
from nd_dist.training.objective.objectives import TOTAL
from nd_dist.training.source import Stream

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What the loop is told of a stage beside its engine and data. Every rank calls the functions alike.

    Args:
        name: 1 or 2, or what else is trained: a name.
        total_steps: Optimizer steps.
        should_stop: Whether this rank was asked to save and stop.
        validate: Returns named numbers of the model (``loss`` among them), equal on every rank; none: no validation.
        keep_best: Keeps the model as the best one so far: the steps made, and what the validation found.
        monitor: Takes the curves.
        after_step: Called after every step (the profiler).
    """

    name: int | str
    total_steps: int
    should_stop: Callable[[], bool]
    validate: Callable[[], Mapping[str, float]] | None
    keep_best: Callable[[int, Mapping[str, float]], None]
    monitor: Monitor
    after_step: Callable[[], None]

    @property
    def task(self) -> str:
        """Name of the progress bar."""
        return f"stage {self.name}" if isinstance(self.name, int) else self.name


def train_stage(
    stage: Stage, engine: Engine, stream: Stream, checkpoints: StageCheckpoints, events: EventLog
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
    training, progress = engine.training, checkpoints.load_newest()
    if progress.step:
        stream.load_state_dict(progress.stream)
    batches = iter(stream)
    first = progress.step
    events.progress(stage.task, first, stage.total_steps)

    while not _is_over(progress, stage, training):
        # One optimizer step
        step, started = progress.step, time.monotonic()
        micro_batches = [next(batches) for _ in range(training.gradient_accumulation)]
        if step == first:
            shapes = batch_facts(micro_batches[0])
            events.write("first_batch", stage=stage.name, **shapes)
            _LOGGER.info("stage %s: this rank's first batch %s", stage.name, shapes)
        outcome = engine.train_step(micro_batches, step, stage.should_stop())
        progress = progress._replace(step=step + 1, loss=outcome.terms[TOTAL], stream=stream.state_dict())

        # What it did
        facts = step_facts(micro_batches, outcome, engine, time.monotonic() - started)
        events.write("train_step", stage=stage.name, step=step, **facts)
        events.progress(stage.task, progress.step, stage.total_steps, loss=progress.loss)
        numbers = {name: float(value) for name, value in facts.items() if isinstance(value, float | int)}
        stage.monitor(curves("train", {**outcome.terms, **numbers}, progress.step))
        stage.after_step()

        # Look at it, keep it
        is_due = progress.step % training.validate_every == 0 or _is_over(progress, stage, training)
        if stage.validate is not None and is_due:
            progress = _validated(progress, stage, stage.validate(), events)
        is_over = _is_over(progress, stage, training)
        if is_over or outcome.should_stop or progress.step % training.checkpoint_every == 0:
            checkpoints.save(progress)
        if outcome.should_stop and not is_over:
            raise Requeue(
                "Training was asked to stop and has saved its state.",
                where=f"{stage.task}, step {progress.step} of {stage.total_steps}",
                todo="run the same command again; it continues from here",
            )
    return progress


def _is_over(progress: Progress, stage: Stage, training: TrainingConfig) -> bool:
    """Whether the stage ends here: at its last step, or early."""
    is_stale = training.early_stop > 0 and progress.stale >= training.early_stop
    return is_stale or progress.step >= stage.total_steps


def _validated(progress: Progress, stage: Stage, found: Mapping[str, float], events: EventLog) -> Progress:
    """Report a validation, keep the model if it is the best so far, and return the progress that knows of it."""
    events.write("validation", stage=stage.name, step=progress.step, values=dict(found))
    stage.monitor(curves("validation", found, progress.step))
    is_better = math.isfinite(found[TOTAL]) and (progress.best is None or found[TOTAL] < progress.best)
    if not is_better:
        return progress._replace(stale=progress.stale + 1)
    stage.keep_best(progress.step, found)
    return progress._replace(best=found[TOTAL], stale=0)


def curves(group: str, values: Mapping[str, float], step: int) -> list[tuple[str, float, int]]:
    """Return the events of a monitor: name, value, optimizer steps made."""
    return [(f"{group}/{name}", value, step) for name, value in values.items()]


def step_facts(batches: list[Batch], outcome: StepOutcome, engine: Engine, seconds: float) -> dict[str, object]:
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
