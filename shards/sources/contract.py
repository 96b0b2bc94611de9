"""The contract between a data set's layout and the packer: what every reader must tell and hand out.

A reader knows one layout on disk (file names, 1-based ids, axis order); the packer knows none. Readers say at
construction what is missing, read whole sessions in ``read_session`` only, and leave it to the packer which trials are
wanted (``data.max_sessions``).

Shape suffixes: T trials, V voxels of one subject, N pictures, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SubjectDesign:
    """What a subject saw, trial by trial in order, and how many voxels its ROI has.

    Args:
        subject: Subject id, 1-based as in file names.
        num_voxels: Voxels of the ROI.
        session: (T,) 1-based session of each trial, non-decreasing.
        image_id: (T,) 0-based image id; -1 where it is not known: such a trial counts for z-scoring only.
        is_test: (T,) whether the image is a test image of the data set's own split: never of training, whoever saw it.
        source: JSON facts that identify this subject's data (kept in the index, compared on resume).
        absent: Sessions that took place, but whose betas are not at hand.
        name: The data set's own name of the subject, where that says more than the number (``sub-01``).
    """

    subject: int
    num_voxels: int
    session: npt.NDArray[np.int64]
    image_id: npt.NDArray[np.int64]
    is_test: npt.NDArray[np.bool_]
    source: Mapping[str, object]
    absent: tuple[int, ...] = ()
    name: str = ""

    @property
    def num_trials(self) -> int:
        """Number of trials T."""
        return len(self.session)

    @property
    def sessions(self) -> tuple[int, ...]:
        """Sessions whose betas are at hand, in order."""
        return tuple(int(session) for session in np.unique(self.session) if session not in self.absent)

    def trials_of(self, session: int) -> npt.NDArray[np.int64]:
        """Return the 0-based trials of a session, in order."""
        return np.flatnonzero(self.session == session)

    @property
    def repeat(self) -> npt.NDArray[np.int64]:
        """(T,) how often the subject had seen the trial's image before, from 0 on."""
        order = np.argsort(self.image_id, kind="stable")
        ids = self.image_id[order]
        is_first = np.concatenate([[True], ids[1:] != ids[:-1]])
        positions = np.arange(len(ids))
        first_position = np.maximum.accumulate(np.where(is_first, positions, 0))
        repeats = np.empty(len(ids), dtype=np.int64)
        repeats[order] = positions - first_position
        return repeats


@dataclass(frozen=True)
class SplitImages:
    """A subject's images in a named split; what is in neither is not used.

    Args:
        train: (n,) image ids to train on.
        test: (m,) image ids to test on.
    """

    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSets:
    """What a data set says of its images, beyond its own test set.

    Args:
        splits: Split name -> subject -> its images. Subjects may differ in them.
        groups: Name -> image ids of a kind, whose metrics are reported apart; groups may overlap.
        duplicates: Sets of images that show (nearly) the same; none of a set is trained on where another is tested.
        source: JSON facts that identify all this (kept in the index).
    """

    splits: Mapping[str, Mapping[int, SplitImages]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    duplicates: Sequence[Sequence[int]] = ()
    source: Mapping[str, object] = field(default_factory=dict)


def image_sets(reader: DatasetReader) -> ImageSets:
    """Return what a reader declares of its images (attribute ``image_sets``), nothing where it does not."""
    return getattr(reader, "image_sets", ImageSets())


class DatasetReader(Protocol):
    """A data set in one layout. Methods raise ``DataError`` where a file is missing or damaged, or does not fit.

    A reader may have an attribute ``image_sets`` (``ImageSets``): named splits, groups and duplicates.
    """

    @property
    def num_images(self) -> int:
        """Number of image ids of the data set."""

    @property
    def source(self) -> Mapping[str, object]:
        """JSON facts that identify the data set's pictures, captions and design; ``simulated``: it is made up."""

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design."""

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return the betas (T, V) of a session's trials in the data set's own unit; NaN where it has none."""

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255, in the order of ``image_ids``."""

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return every picture's captions, in the order of ``image_ids``."""
