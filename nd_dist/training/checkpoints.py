"""Checkpoints of a stage: state copied to the host, written by a thread, committed by a manifest and then a pointer.

A checkpoint counts only once the pointer names it. A crash at any moment leaves the one before in place. Training goes
on while files are written; every rank says with its next steps whether its own are there, and all commit at one step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nd_dist.checkpoint import FileRecord, read_manifest, read_pointer, write_manifest, write_pointer
from nd_dist.errors import CheckpointError, DataError, StorageError
from nd_dist.events import EventLog
from nd_dist.training.engine.engine import Engine
from nd_dist.training.engine.saving import layout_of, load_state, stage_state, write_state
from nd_dist.training.ranks import gather_objects, on_main
from nd_dist.training.records import check_fingerprint

PREFIX = "step-"
WRITTEN = "written"


class Progress(NamedTuple):
    """How far a stage is.

    Args:
        step: Optimizer steps made.
        loss: Loss of the last one that was read (0 before the first).
        best: Lowest validation loss so far; none before the first validation.
        stale: Validations since that one.
        stream: State of the data stream: what the next step reads follows from it.
    """

    step: int = 0
    loss: float = 0.0
    best: float | None = None
    stale: int = 0
    stream: Mapping[str, object] = {}


@dataclass(frozen=True)
class _Pending:
    """A checkpoint whose files are being written, since when, and the records of this rank's files once they are."""

    progress: Progress
    started: float
    records: Future[dict[str, FileRecord]]

    @property
    def tag(self) -> str:
        """Name of its folder."""
        return f"{PREFIX}{self.progress.step:07d}"


class StageCheckpoints:
    """Saves and restores one stage. Every rank makes the same calls.

    Args:
        folder: Folder of the stage.
        engine: The engine whose state it is.
        facts: Fingerprint of the stage; a checkpoint with another one is refused.
        events: This rank's event file.
        grace_s: Seconds that ranks get to save when they are asked to stop.
    """

    def __init__(
        self, folder: Path, engine: Engine, facts: Mapping[str, object], events: EventLog, grace_s: float
    ) -> None:
        self._folder, self._engine, self._facts, self._events = folder, engine, dict(facts), events
        self._grace_s, self._last_save = grace_s, time.monotonic()
        self._pending: _Pending | None = None
        self._jobs: list[Future[Any]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def flags(self) -> dict[str, bool]:
        """What the other ranks are to hear: whether this rank's files are written (or cannot be)."""
        return {WRITTEN: self._pending is not None and self._pending.records.done()}

    @property
    def age_s(self) -> float:
        """Seconds since the last save, or since the start."""
        return time.monotonic() - self._last_save

    def write_later(self, act: Callable[[], object]) -> None:
        """Let the thread do something for this stage, after what it was given and before the next checkpoint."""
        self._jobs.append(self._writer.submit(act))

    def save(self, progress: Progress) -> None:
        """Begin to save the state after ``progress.step`` optimizer steps; the one before is finished first.

        Raises:
            StorageError: the one before could not be written (disk full).
        """
        self.finish()
        started = self._last_save = time.monotonic()
        tag = f"{PREFIX}{progress.step:07d}"
        on_main(lambda: shutil.rmtree(self._folder / tag, ignore_errors=True))  # left by a crash, never committed
        staged = stage_state(self._engine, self._folder, tag)
        self._pending = _Pending(progress, started, self._writer.submit(write_state, staged, self._folder / tag))
        self._jobs.append(self._pending.records)

    def note(self, flags: Mapping[str, int]) -> None:
        """Commit what every rank had written when the step began whose flags these are."""
        if self._pending is not None and flags[WRITTEN] == self._engine.world.size:
            self.finish()

    def finish(self) -> None:
        """Wait until everything is written and commit it.

        Raises:
            StorageError: on every rank, where one could not write; the checkpoint before stays valid.
        """
        pending, jobs, self._pending, self._jobs = self._pending, self._jobs, None, []
        error = next((error for job in jobs if (error := job.exception()) is not None), None)
        records = pending.records.result() if pending is not None and error is None else {}
        answers = gather_objects((error is None, records))
        if error is not None:
            raise error
        if failed := [rank for rank, (is_well, _) in enumerate(answers) if not is_well]:
            raise StorageError("Another rank could not write its part of a checkpoint.", where=f"ranks {failed}")
        if pending is None:
            return
        files = {name: record for _, records in answers for name, record in records.items()}
        seconds = round(time.monotonic() - pending.started, 3)
        on_main(partial(self._commit, pending, files))
        num_bytes = sum(record.num_bytes for record in files.values())
        step = pending.progress.step
        self._events.write("checkpoint_saved", tag=pending.tag, step=step, num_bytes=num_bytes, seconds=seconds)
        if seconds > self._grace_s:
            self._events.write(
                "notice",
                message=f"a checkpoint takes {seconds:.0f} s to write, and a stop allows {self._grace_s:.0f} s: "
                "set launch.stop_grace_s higher, or a stop may lose the steps since the last checkpoint",
            )

    def close(self) -> None:
        """Stop the thread once it has written what it was given."""
        self._writer.shutdown(wait=True)

    def _commit(self, pending: _Pending, files: Mapping[str, FileRecord]) -> None:
        """Make a completely written checkpoint count, then remove what fell out of the window (rank 0)."""
        step = pending.progress.step
        facts = {
            "step": step,
            "progress": pending.progress._asdict(),
            "fingerprint": self._facts,
            "layout": layout_of(self._engine),
        }
        write_manifest(self._folder / pending.tag, files, facts)
        write_pointer(self._folder, pending.tag)
        steps = sorted(int(tag.removeprefix(PREFIX)) for tag in self._tags())
        committed = [other for other in steps if other <= step]  # newer ones never were
        kept = committed[-self._engine.training.keep_checkpoints :]
        for other in set(steps) - set(kept):
            shutil.rmtree(self._folder / f"{PREFIX}{other:07d}")

    def load_newest(self) -> Progress:
        """Restore the newest valid checkpoint and return how far it is; step 0 where none was ever committed.

        Raises:
            CheckpointError: on every rank, where the checkpoint is of another recipe or layout, or where checkpoints
                were committed and none is valid any more.
        """
        committed, tags = on_main(lambda: (read_pointer(self._folder), self._tags()))
        found: list[str] = []
        for tag in sorted((tag for tag in tags if tag <= committed or not committed), reverse=True):
            facts, problem = self._checked(tag)
            if problem:
                found.append(problem)
                self._events.write("checkpoint_invalid", tag=tag, problem=problem)
                continue
            check_fingerprint(self._facts, facts["fingerprint"], self._folder / tag)
            load_state(self._engine, self._folder, tag, facts["layout"])
            saved_by = facts["layout"]["world_size"]
            self._events.write("checkpoint_loaded", tag=tag, step=facts["step"], saved_by_ranks=saved_by)
            return Progress(**facts["progress"])
        if committed:
            raise CheckpointError(
                "No checkpoint of this stage is valid any more.",
                where=str(self._folder),
                found="; ".join(problem.splitlines()[0] for problem in found) or "no checkpoint folder",
                todo="remove the folder to train the stage from scratch",
            )
        return Progress()

    def _checked(self, tag: str) -> tuple[dict[str, Any], str]:
        """Return a checkpoint's facts and what is wrong with it, if anything; the ranks share its files."""
        world, facts, problem = self._engine.world, {}, ""
        try:
            facts = read_manifest(self._folder / tag, slice(world.rank, None, world.size))
        except (CheckpointError, DataError) as error:
            problem = str(error)
        return facts, next(filter(None, gather_objects(problem)), "")

    def _tags(self) -> list[str]:
        """Return the names of the checkpoint folders that exist, committed or not."""
        return sorted(path.name for path in self._folder.glob(f"{PREFIX}*") if path.is_dir())
