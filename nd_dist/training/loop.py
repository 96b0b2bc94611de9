"""The training loop of one stage: batches -> objective -> engine -> events -> checkpoint; reads as the stage runs."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nd_dist.config import TrainingConfig
from nd_dist.errors import Requeue
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.schema import Batch
from nd_dist.training.checkpoints import Progress, StageCheckpoints
from nd_dist.training.engine import Engine, StepOutcome
from nd_dist.training.objectives import TOTAL
from nd_dist.training.source import Stream

Validate = Callable[[Decoder, int], Mapping[str, float]]
"""Called by every rank with the model and the steps made so far; returns named numbers for this rank's event. Under
ZeRO 3 every rank must call the model equally often."""


@dataclass(frozen=True)
class Hooks:
    """What the caller lets the loop ask.

    Args:
        should_stop: Whether this rank was asked to save and stop.
        validate: Looks at the model now and then; none: no validation.
    """

    should_stop: Callable[[], bool]
    validate: Validate | None = None


@dataclass(frozen=True)
class StagePlan:
    """How long a stage trains and how often it reports.

    Args:
        stage: 1 or 2.
        total_steps: Optimizer steps.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations.
        gradient_accumulation: Batches of one optimizer step.
    """

    stage: int
    total_steps: int
    checkpoint_every: int
    validate_every: int
    gradient_accumulation: int

    @staticmethod
    def of(training: TrainingConfig, stage: int) -> StagePlan:
        """Return the plan of a stage of a recipe."""
        return StagePlan(
            stage,
            training.steps[stage - 1],
            training.checkpoint_every,
            training.validate_every,
            training.gradient_accumulation,
        )


def train_stage(
    plan: StagePlan,
    engine: Engine,
    stream: Stream,
    checkpoints: StageCheckpoints,
    events: EventLog,
    hooks: Hooks,
) -> float:
    """Train one stage from its newest checkpoint to its last step. Every rank calls it.

    Returns:
        The loss of the last step.

    Raises:
        Requeue: a rank was asked to stop; the state is saved and the same command continues.
        NonFiniteError: a loss or gradient is not finite; no parameter was changed by that step.
        CheckpointError: the newest checkpoint is of another recipe, or a checkpoint could not be written.
    """
    # Continue where the newest valid checkpoint stopped
    first, loss = checkpoints.load_newest()
    stream.load_state_dict({**stream.state_dict(), "step": first * plan.gradient_accumulation})
    batches = iter(stream)
    events.progress(_task(plan), first, plan.total_steps)

    for step in range(first, plan.total_steps):
        # One optimizer step
        started = time.monotonic()
        micro_batches = [next(batches) for _ in range(plan.gradient_accumulation)]
        if step == first:
            events.write("first_batch", stage=plan.stage, **batch_facts(micro_batches[0]))
        outcome = engine.train_step(micro_batches, step, hooks.should_stop())
        loss, done = outcome.terms[TOTAL], step + 1

        # What it did
        facts = step_facts(micro_batches, outcome, engine, time.monotonic() - started)
        events.write("train_step", stage=plan.stage, step=step, **facts)
        events.progress(_task(plan), done, plan.total_steps, loss=loss)

        # Look at it, keep it
        is_last = done == plan.total_steps
        if hooks.validate is not None and (is_last or done % plan.validate_every == 0):
            found = hooks.validate(engine.objective.decoder, done)
            events.write("validation", stage=plan.stage, step=done, values=dict(found))
        if is_last or outcome.should_stop or done % plan.checkpoint_every == 0:
            checkpoints.save(Progress(done, loss))
        if outcome.should_stop and not is_last:
            raise _requeue(plan, done)
    return loss


def _task(plan: StagePlan) -> str:
    """Return the progress bar's name."""
    return f"stage {plan.stage}"


def _requeue(plan: StagePlan, step: int) -> Requeue:
    """Return the error that says: saved, start me again."""
    return Requeue(
        "Training was asked to stop and has saved its state.",
        where=f"stage {plan.stage}, step {step} of {plan.total_steps}",
        todo="run the same command again; it continues from here",
    )


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
