"""The training loop of one stage: batches -> objective -> engine -> events -> checkpoint; reads as the stage runs."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nd_dist.config import TrainingConfig
from nd_dist.errors import Requeue
from nd_dist.events import EventLog
from nd_dist.schema import Batch
from nd_dist.training.checkpoints import Progress, StageCheckpoints
from nd_dist.training.engine.engine import Engine, LaunchedStep, Monitor, StepOutcome
from nd_dist.training.objective.objectives import TOTAL
from nd_dist.training.ranks import NonFiniteError
from nd_dist.training.source import Stream

_LOGGER = logging.getLogger(__name__)

AHEAD = 1
"""Steps that are launched before the numbers of one are read: the device never waits for the host."""
PROGRESS_S, PACE_S = 1.0, 60.0
"""Least seconds between two progress events of rank 0, and between two events of another rank's pace."""
STOP, IS_TIME = "stop", "is_time"


@dataclass(frozen=True)
class Stage:
    """What the loop is told of a stage beside its engine and data. Every rank calls the functions alike.

    Args:
        name: 1 or 2, or what else is trained: a name.
        total_steps: Optimizer steps.
        rows: Rows of an optimizer step over all ranks.
        should_stop: Whether this rank was asked to save and stop.
        validate: Returns named numbers of the model (``loss`` among them), equal on every rank; none: no validation.
        split: Where the validation's images come from: ``heldout`` or ``test``.
        keep_best: Keeps the model as the best one so far: the steps made, and what the validation found.
        monitor: Takes the curves.
        after_step: Called after every step (the profiler).
    """

    name: int | str
    total_steps: int
    rows: int
    should_stop: Callable[[], bool]
    validate: Callable[[], Mapping[str, float]] | None = None
    split: str = "test"
    keep_best: Callable[[int, Mapping[str, float]], None] = lambda step, found: None
    monitor: Monitor = lambda events: None
    after_step: Callable[[], None] = lambda: None

    @property
    def task(self) -> str:
        """Name of the progress bar."""
        return f"stage {self.name}" if isinstance(self.name, int) else self.name


class _Step(NamedTuple):
    """A launched step, when the host began with it, and the seconds for which it waited for its data."""

    launched: LaunchedStep
    started: float
    waited_s: float


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
    if progress.step:  # the first checkpoints held no state of the stream
        start = {**stream.state_dict(), "step": progress.step * training.gradient_accumulation}
        stream.load_state_dict(progress.stream or start)
    batches, first = iter(stream), progress.step
    record = _Record(stage, engine, checkpoints, events)
    launched, raised = deque[_Step](), set[str]()
    events.progress(stage.task, first, stage.total_steps)

    while not _is_over(progress, stage, training):
        # Launch one optimizer step
        step, started = progress.step, time.monotonic()
        micro_batches = [next(batches) for _ in range(training.gradient_accumulation)]
        if step == first:
            shapes = batch_facts(micro_batches[0])
            events.write("first_batch", stage=stage.name, **shapes)
            _LOGGER.info("stage %s: this rank's first batch %s", stage.name, shapes)
        flags = {STOP: stage.should_stop(), IS_TIME: _is_time(checkpoints, engine), **checkpoints.flags}
        waited_s = sum(batch.data_wait_s for batch in micro_batches)
        launched.append(_Step(engine.train_step(micro_batches, step, flags), started, waited_s))
        stage.after_step()
        progress = progress._replace(step=step + 1)

        # Read what earlier ones did, all of them where the model is looked at or kept
        is_last = progress.step >= stage.total_steps
        is_look = stage.validate is not None and (progress.step % training.validate_every == 0 or is_last)
        is_save = progress.step % training.checkpoint_every == 0 or is_last
        while len(launched) > (0 if is_look or is_save or raised else AHEAD):
            done = launched.popleft()  # it ended, at the latest, when the next one was begun
            ended = launched[0].started if launched else time.monotonic()
            loss, heard = record.read(done, ended - done.started)
            progress, raised = progress._replace(loss=loss), raised | heard
            is_save = is_save or bool(raised)

        # Look at it, keep it
        if is_look and stage.validate is not None:
            progress = _validated(progress, stage, stage.validate(), events)
        if is_save or _is_over(progress, stage, training):
            checkpoints.save(progress._replace(stream=stream.state_dict()))
            if STOP in raised and not _is_over(progress, stage, training):
                checkpoints.finish()
                raise Requeue(
                    "Training was asked to stop and has saved its state.",
                    where=f"{stage.task}, step {progress.step} of {stage.total_steps}",
                    todo="run the same command again; it continues from here",
                )
            raised = set()
    checkpoints.finish()
    return progress


def _is_over(progress: Progress, stage: Stage, training: TrainingConfig) -> bool:
    """Whether the stage ends here: at its last step, or early."""
    is_stale = training.early_stop > 0 and progress.stale >= training.early_stop
    return is_stale or progress.step >= stage.total_steps


def _is_time(checkpoints: StageCheckpoints, engine: Engine) -> bool:
    """Whether rank 0's clock says that a checkpoint is due."""
    every_s = engine.training.checkpoint_every_s
    return engine.world.is_main and 0 < every_s <= checkpoints.age_s


def _validated(progress: Progress, stage: Stage, found: Mapping[str, float], events: EventLog) -> Progress:
    """Report a validation, keep the model if it is the best so far, and return the progress that knows of it."""
    events.write("validation", stage=stage.name, step=progress.step, split=stage.split, values=dict(found))
    stage.monitor(curves("validation" if stage.split == "heldout" else stage.split, found, progress.step))
    is_better = math.isfinite(found[TOTAL]) and (progress.best is None or found[TOTAL] < progress.best)
    if not is_better:
        return progress._replace(stale=progress.stale + 1)
    stage.keep_best(progress.step, found)
    return progress._replace(best=found[TOTAL], stale=0)


class _Record:
    """Writes down what steps did: rank 0 their losses, the others now and then how fast they are.

    Args:
        stage, engine, checkpoints, events: The loop's.
    """

    def __init__(self, stage: Stage, engine: Engine, checkpoints: StageCheckpoints, events: EventLog) -> None:
        self._stage, self._engine, self._checkpoints, self._events = stage, engine, checkpoints, events
        self._shown = self._paced = time.monotonic()
        self._num, self._seconds, self._waited_s = 0, 0.0, 0.0

    def read(self, done: _Step, seconds: float) -> tuple[float, set[str]]:
        """Wait for a step, write down what it did, and return its loss and which flags any rank raised with it.

        Raises:
            NonFiniteError: a loss or gradient is not finite; what is being saved is of an earlier step, and kept.
        """
        try:
            outcome = done.launched.read()
        except NonFiniteError:
            self._checkpoints.finish()
            raise
        self._checkpoints.note(outcome.flags)
        loss, step = outcome.terms[TOTAL], done.launched.step
        if self._engine.world.is_main:
            facts = step_facts(outcome, seconds, done.waited_s, self._stage.rows, self._engine.device)
            self._events.write("train_step", stage=self._stage.name, step=step, **facts)
            numbers = {name: float(value) for name, value in facts.items() if isinstance(value, float | int)}
            self._stage.monitor(curves("train", {**outcome.terms, **numbers}, step + 1))
        self._tell(step + 1, loss, seconds, done.waited_s)
        return loss, {name for name in (STOP, IS_TIME) if outcome.flags[name]}

    def _tell(self, steps: int, loss: float, seconds: float, waited_s: float) -> None:
        """Write how far rank 0 is, at most once a second; of another rank its pace, once a minute."""
        stage, now, is_last = self._stage, time.monotonic(), steps == self._stage.total_steps
        if self._engine.world.is_main:
            if is_last or now - self._shown >= PROGRESS_S:
                self._shown = now
                self._events.progress(stage.task, steps, stage.total_steps, loss=loss)
            return
        self._num, self._seconds, self._waited_s = self._num + 1, self._seconds + seconds, self._waited_s + waited_s
        if is_last or now - self._paced >= PACE_S:
            share, memory = self._waited_s / self._seconds, peak_memory_bytes(self._engine.device)
            pace = {"step_s": round(self._seconds / self._num, 6), "data_wait_share": round(share, 6)}
            self._events.write("pace", stage=stage.name, step=steps, steps=self._num, **pace, memory_bytes=memory)
            self._paced, self._num, self._seconds, self._waited_s = now, 0, 0.0, 0.0


def curves(group: str, values: Mapping[str, float], step: int) -> list[tuple[str, float, int]]:
    """Return the events of a monitor: name, value, optimizer steps made."""
    return [(f"{group}/{name}", value, step) for name, value in values.items()]


def step_facts(
    outcome: StepOutcome, seconds: float, waited_s: float, rows: int, device: torch.device
) -> dict[str, object]:
    """Return the fields of a ``train_step`` event."""
    return {
        "loss": outcome.terms[TOTAL],
        "terms": {name: value for name, value in outcome.terms.items() if name != TOTAL},
        "learning_rate": outcome.learning_rate,
        "grad_norm": outcome.grad_norm,
        "is_skipped": outcome.is_skipped,
        "step_s": round(seconds, 6),
        "samples_per_s": round(rows / seconds, 3),
        "data_wait_share": round(waited_s / seconds, 6),
        "memory_bytes": peak_memory_bytes(device),
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
