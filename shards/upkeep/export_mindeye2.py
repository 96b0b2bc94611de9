"""Writes packed shards back as MindEye2's published files (see ``shards.sources.mindeye2`` for the layout).

What the shards do not hold is written as MindEye2 writes it: -1 for unknown behaviour (run, times, answers). Captions
are not packed, so they are not exported. Voxels are what was packed: z-scored, rounded to the stored precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from nd_dist.errors import DataError
from nd_dist.files import atomic_path, read_json, write_bytes, write_json
from shards.format.codec import PICTURES
from shards.format.index import Index
from shards.format.tables import ABSENT, TEST, Table, table_bytes
from shards.reading.reader import ShardReader
from shards.sources import mindeye2
from shards.sources.mindeye2 import IMAGE, IS_SHARED, NUM_COLUMNS, SESSION, SUBJECT, TRIAL

PICTURE_SIDE = 224
NUM_NEIGHBOURS, NUM_OLDS = 15, 3


@dataclass(frozen=True)
class ExportSummary:
    """What was exported.

    Args:
        files: Paths below the folder, in order.
        has_pictures: Whether the pictures are among them.
    """

    files: tuple[str, ...]
    has_pictures: bool


def export(reader: ShardReader, out_dir: Path, subjects: Sequence[int] | None = None) -> ExportSummary:
    """Write MindEye2's files of packed shards; run again after an interruption it keeps what is whole.

    Args:
        reader: The shards.
        out_dir: New folder, or one of an interrupted export of the same shards.
        subjects: Only these (none: all).

    Raises:
        DataError: a subject was not packed, a shard is damaged, the folder holds something else, or the disk is full.
    """
    index, made = reader.index, _claim(out_dir, reader.index)
    wanted = sorted(index.subjects) if subjects is None else list(subjects)
    files = []
    for subject in wanted:
        rows = reader.trials_of(subject)
        files.append(out_dir / _betas_name(subject))
        write = partial(_write_betas, files[-1], reader, subject, rows)
        made.write(files[-1].name, index.content_id((subject,), ()), write)
        files += _write_behaviour(out_dir / f"wds/subj{subject:02d}", rows)
    shared = np.zeros(reader.index.num_images, dtype=np.bool_)
    shared[reader.trials["image"][reader.trials["split"] == TEST]] = True
    write_bytes(out_dir / "shared1000.npy", table_bytes(shared))
    files.append(out_dir / "shared1000.npy")
    exported = [subject for subject in index.subjects if _betas_name(subject) in made.files]
    seen = np.unique(np.concatenate([reader.trials_of(subject)["image"] for subject in exported]))
    has_pictures = PICTURES in index.features and bool((reader.store(PICTURES)["shard"][seen] != ABSENT).all())
    if has_pictures:
        files.append(out_dir / mindeye2.PICTURES)
        made_for = index.content_id(exported, (PICTURES,))
        made.write(files[-1].name, made_for, partial(_write_pictures, files[-1], reader, seen))
    return ExportSummary(tuple(str(path.relative_to(out_dir)) for path in files), has_pictures)


@dataclass
class _Made:
    """The large files of an export, and the content that each was made of.

    Args:
        record: The file that says so.
        is_simulated: Whether the data are made up.
        files: Name -> hash of the content.
    """

    record: Path
    is_simulated: bool | None
    files: dict[str, str]

    def write(self, name: str, made_for: str, write: Callable[[], None]) -> None:
        """Write a file, unless it is there and was made of the same content."""
        if self.files.get(name) != made_for or not (self.record.parent / name).is_file():
            write()
            self.files[name] = made_for
            write_json(self.record, {"simulated": self.is_simulated, "files": self.files})


def _betas_name(subject: int) -> str:
    return f"betas_all_subj{subject:02d}_fp32_renorm.hdf5"


def _claim(out_dir: Path, index: Index) -> _Made:
    """Return what a folder holds of an export.

    Raises:
        DataError: it holds something else, or an export of other shards.
    """
    record, found = out_dir / mindeye2.EXPORT_RECORD, "other files"
    made = _Made(record, index.is_simulated, {})
    if record.is_file():
        made.files = dict(read_json(record).get("files", {}))
        content = {_betas_name(subject): index.content_id((subject,), ()) for subject in index.subjects}
        found = "an export of other shards"
        if all(content.get(name) == made_for for name, made_for in made.files.items() if name != mindeye2.PICTURES):
            return made
    if out_dir.exists() and any(out_dir.iterdir()):
        raise DataError(
            "The folder to export to is not empty.", where=str(out_dir), found=found, todo="choose a new folder"
        )
    write_json(record, {"simulated": index.is_simulated, "files": {}})
    return made


def _write_betas(path: Path, reader: ShardReader, subject: int, rows: Table) -> None:
    """Write (trials, voxels) float32 in trial order, a session at a time; trials that were not packed are zero."""
    num_voxels = reader.num_voxels[subject]
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        betas = file.create_dataset("betas", (int(rows["trial"][-1]) + 1, num_voxels), dtype="<f4")
        for session in np.unique(rows["session"]):
            of_session = rows[rows["session"] == session]
            stored_TV = np.empty((len(of_session), num_voxels), dtype=reader.index.voxels.dtype)
            reader.read_voxels(of_session, stored_TV)
            trials = of_session["trial"]
            is_whole = int(trials[-1]) - int(trials[0]) + 1 == len(trials)
            betas[slice(trials[0], trials[-1] + 1) if is_whole else trials] = stored_TV


def behaviour(rows: Table) -> npt.NDArray[np.float64]:
    """Return MindEye2's behaviour (T, 17) of a subject's trials; what the shards do not know is -1."""
    values = np.full((len(rows), NUM_COLUMNS), -1.0)
    for column, name in ((IMAGE, "image"), (SUBJECT, "subject"), (SESSION, "session"), (TRIAL, "trial")):
        values[:, column] = rows[name]
    values[:, IS_SHARED] = rows["split"] == TEST
    return values


def _write_behaviour(folder: Path, rows: Table) -> list[Path]:
    """Write the tars of one subject: training trials by session, all test trials in one."""
    values = behaviour(rows)
    is_test = rows["split"] == TEST
    wanted = {
        folder / f"train/{session - 1}.tar": np.flatnonzero((rows["session"] == session) & ~is_test)
        for session in np.unique(rows["session"][~is_test]).tolist()
    }
    wanted[folder / "new_test/0.tar"] = np.flatnonzero(is_test)
    for path, trials in wanted.items():
        _write_tar(path, values, trials)
    return list(wanted)


def _write_tar(path: Path, values: npt.NDArray[np.float64], trials: npt.NDArray[np.int64]) -> None:
    """Write one tar of behaviour; equal trials give equal bytes."""
    from webdataset import TarWriter  # imports torch

    with atomic_path(path) as part, open(part, "wb") as stream:
        tar = TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False)
        for trial in trials.tolist():
            same_session = np.flatnonzero(values[:, SESSION] == values[trial, SESSION])
            before, after = same_session[same_session < trial], same_session[same_session > trial]
            others = np.flatnonzero(values[:, IMAGE] == values[trial, IMAGE])
            tar.write(
                {
                    "__key__": f"sample{int(values[trial, TRIAL]):09d}",
                    "behav.npy": table_bytes(values[trial : trial + 1]),
                    "past_behav.npy": table_bytes(_padded(values[before[::-1]], NUM_NEIGHBOURS)),
                    "future_behav.npy": table_bytes(_padded(values[after], NUM_NEIGHBOURS)),
                    "olds_behav.npy": table_bytes(_padded(values[others[others != trial]], NUM_OLDS)),
                }
            )
        tar.close()


def _padded(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Return exactly ``count`` rows: the first ones, then rows of -1."""
    padded = np.full((count, NUM_COLUMNS), -1.0)
    padded[: min(count, len(values))] = values[:count]
    return padded


def _write_pictures(path: Path, reader: ShardReader, image_ids: npt.NDArray[np.integer]) -> None:
    """Write (num_images, 3, 224, 224) float16, 0..1; images that nobody saw are zero."""
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        shape = (3, PICTURE_SIDE, PICTURE_SIDE)
        images = file.create_dataset("images", (reader.index.num_images, *shape), dtype="<f2", chunks=(1, *shape))
        for image_id in image_ids.tolist():
            picture = Image.fromarray(reader.pictures([image_id])[0])
            if picture.size != (PICTURE_SIDE, PICTURE_SIDE):
                picture = picture.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
            images[image_id] = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255
