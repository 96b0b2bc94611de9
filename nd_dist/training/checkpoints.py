"""Checkpoints of a stage: DeepSpeed's state, committed by a manifest and then an atomic pointer; a rolling window.

A checkpoint counts only once the pointer names it. A crash at any moment leaves the one before in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nd_dist.checkpoint import FileRecord, read_manifest, read_pointer, write_manifest, write_pointer
from nd_dist.errors import CheckpointError, DataError
from nd_dist.events import EventLog
from nd_dist.training.engine.engine import Engine
from nd_dist.training.engine.saving import layout_of, load_state, save_state
from nd_dist.training.ranks import gather_objects, on_main
from nd_dist.training.records import check_fingerprint

PREFIX = "step-"


class Progress(NamedTuple):
    """How far a stage is.

    Args:
        step: Optimizer steps made.
        loss: Loss of the last one (0 before the first).
        best: Lowest validation loss so far; none before the first validation.
        stale: Validations since that one.
        stream: State of the data stream: what the next step reads follows from it.
    """

    step: int = 0
    loss: float = 0.0
    best: float | None = None
    stale: int = 0
    stream: Mapping[str, object] = {}


class StageCheckpoints:
    """Saves and restores one stage. Every rank makes the same calls.

    Args:
        folder: Folder of the stage.
        engine: The engine whose state it is.
        facts: Fingerprint of the stage; a checkpoint with another one is refused.
        events: This rank's event file.
    """

    def __init__(self, folder: Path, engine: Engine, facts: Mapping[str, object], events: EventLog) -> None:
        self._folder, self._engine, self._facts, self._events = folder, engine, dict(facts), events

    def save(self, progress: Progress) -> None:
        """Save the state after ``progress.step`` optimizer steps.

        Raises:
            StorageError: this rank could not write (disk full); the checkpoint before stays valid.
        """
        tag = f"{PREFIX}{progress.step:07d}"
        on_main(lambda: shutil.rmtree(self._folder / tag, ignore_errors=True))  # left by a crash, never committed
        save_state(self._engine, self._folder, tag)
        files = self._hashed_files(self._folder / tag)
        on_main(lambda: self._commit(progress, tag, files))
        num_bytes = sum(record.num_bytes for record in files.values())
        self._events.write("checkpoint_saved", tag=tag, step=progress.step, num_bytes=num_bytes)

    def _commit(self, progress: Progress, tag: str, files: Mapping[str, FileRecord]) -> None:
        """Make a completely written checkpoint count, then remove what fell out of the window (rank 0)."""
        facts = {
            "step": progress.step,
            "progress": progress._asdict(),
            "fingerprint": self._facts,
            "layout": layout_of(self._engine),
        }
        write_manifest(self._folder / tag, files, facts)
        write_pointer(self._folder, tag)
        steps = sorted(int(path.name.removeprefix(PREFIX)) for path in self._tags())
        committed = [other for other in steps if other <= progress.step]  # newer ones never were
        kept = committed[-self._engine.training.keep_checkpoints :]
        for other in set(steps) - set(kept):
            shutil.rmtree(self._folder / f"{PREFIX}{other:07d}")

    def load_newest(self) -> Progress:
        """Restore the newest valid checkpoint and return how far it is; step 0 where none was ever committed.

        Raises:
            CheckpointError: on every rank, where the checkpoint is of another recipe or layout, or where checkpoints
                were committed and none is valid any more.
        """
        found = on_main(self._choose)
        for problem in found["problems"]:
            self._events.write("checkpoint_invalid", **problem)
        if not found["tag"]:
            return Progress()
        facts = found["facts"]
        check_fingerprint(self._facts, facts["fingerprint"], self._folder / found["tag"])
        load_state(self._engine, self._folder, found["tag"], facts["layout"])
        saved_by = facts["layout"]["world_size"]
        self._events.write("checkpoint_loaded", tag=found["tag"], step=facts["step"], saved_by_ranks=saved_by)
        return Progress(**facts["progress"])

    def _choose(self) -> dict[str, Any]:
        """Return tag and facts of the newest valid checkpoint, and what is wrong with newer ones (rank 0).

        Raises:
            CheckpointError: the pointer names a checkpoint, but neither it nor an older one is valid.
        """
        committed = read_pointer(self._folder)
        candidates = [path.name for path in self._tags() if path.name <= committed or not committed]
        problems: list[dict[str, str]] = []
        for tag in sorted(candidates, reverse=True):
            try:
                return {"tag": tag, "facts": read_manifest(self._folder / tag), "problems": problems}
            except (CheckpointError, DataError) as error:
                problems.append({"tag": tag, "problem": str(error)})
        if committed:
            raise CheckpointError(
                "No checkpoint of this stage is valid any more.",
                where=str(self._folder),
                found="; ".join(problem["problem"].splitlines()[0] for problem in problems) or "no checkpoint folder",
                todo="remove the folder to train the stage anew",
            )
        return {"tag": "", "facts": {}, "problems": problems}

    def _hashed_files(self, folder: Path) -> dict[str, FileRecord]:
        """Return the records of all files; the ranks share the hashing."""
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        world = self._engine.world
        own = {name: FileRecord.of(folder / name) for name in names[world.rank :: world.size]}
        merged: dict[str, FileRecord] = {}
        for part in gather_objects(own):
            merged.update(part)
        return dict(sorted(merged.items()))

    def _tags(self) -> list[Path]:
        """Return the checkpoint folders that exist, committed or not."""
        return sorted(path for path in self._folder.glob(f"{PREFIX}*") if path.is_dir())
