"""NSD's file names and its experimental design: where files lie, and which 0-based image every trial showed.

Sources: NSD data manual; the published preprocessing of Brain-Diffuser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.io

from nd_dist.errors import DataError
from shards.sources.files import open_hdf5, reading

SPACE = "func1pt8mm"
FETCH = "check nsd_root; `nd fetch nsd --to DIR` prints what downloads it"
PHANTOM_RECORD, PHANTOM_STARTED = "phantom.json", ".phantom-started.json"


@dataclass(frozen=True)
class NsdLayout:
    """Where NSD keeps its files.

    Args:
        root: Folder that holds ``nsddata``, ``nsddata_betas`` and ``nsddata_stimuli``.
    """

    root: Path

    @property
    def is_phantom(self) -> bool:
        """Whether `nd phantom` made this data set up."""
        return any((self.root / name).exists() for name in (PHANTOM_RECORD, PHANTOM_STARTED))

    @property
    def expdesign(self) -> Path:
        """The order of images and who saw which (MATLAB)."""
        return self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"

    @property
    def stim_info(self) -> Path:
        """What every image is: COCO id and split, who saw it when (CSV)."""
        return self.root / "nsddata/experiments/nsd/nsd_stim_info_merged.csv"

    @property
    def stimuli(self) -> Path:
        """All pictures (HDF5, dataset ``imgBrick``)."""
        return self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"

    def responses(self, subject: int) -> Path:
        """A subject's behaviour, one row a trial (TSV)."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"

    def roi(self, subject: int, name: str) -> Path:
        """An ROI volume."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/{SPACE}/roi/{name}.nii.gz"

    def betas_dir(self, subject: int, version: str) -> Path:
        """The folder of a subject's betas of one version."""
        return self.root / f"nsddata_betas/ppdata/subj{subject:02d}/{SPACE}/{version}"

    def betas(self, subject: int, version: str, session: int, suffix: str) -> Path:
        """One session's betas; ``suffix`` is ``.nii.gz`` or ``.hdf5``."""
        return self.betas_dir(subject, version) / f"betas_session{session:02d}{suffix}"

    def ncsnr(self, subject: int, version: str) -> Path:
        """The noise-ceiling signal-to-noise ratio of every voxel."""
        return self.betas_dir(subject, version) / "ncsnr.nii.gz"


@dataclass(frozen=True)
class Experiment:
    """NSD's design with 0-based ids.

    Args:
        image_id: (subjects, T) image of every trial of a complete subject.
        order: (T,) which of a subject's images a trial shows (NSD's 10k id).
        is_test: (T,) whether a trial shows an image that all subjects share.
        trials_per_session: (sessions,) number of trials.
    """

    image_id: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    is_test: npt.NDArray[np.bool_]
    trials_per_session: npt.NDArray[np.int64]

    @staticmethod
    def read(path: Path) -> Experiment:
        """Return the design in ``nsd_expdesign.mat``.

        Raises:
            DataError: the file is missing, damaged, or contradicts itself.
        """
        if not path.is_file():
            raise DataError("NSD's design is missing.", where=str(path), todo=FETCH)
        with reading(path, "NSD's design"):
            content = scipy.io.loadmat(path)
            order = content["masterordering"].ravel().astype(np.int64) - 1
            subject_images = content["subjectim"].astype(np.int64) - 1
            shared = content["sharedix"].ravel().astype(np.int64) - 1
            pattern = np.atleast_3d(content["stimpattern"]).astype(np.int64)
            trials_per_session = pattern.sum(axis=(1, 2))
            image_id = subject_images[:, order]
        is_test = order < len(shared)  # the first 10k-indices are the shared images
        lowest = min(int(values.min()) for values in (order, subject_images, shared))
        for found, expected, what in (
            (lowest >= 0, True, "all ids are counted from 1"),
            (int(trials_per_session.sum()), len(order), "stimpattern holds as many stimuli as masterordering"),
            (bool(np.isin(image_id[:, is_test], shared).all()), True, "the first indices of subjectim are sharedix"),
            (bool(np.isin(image_id[:, ~is_test], shared).any()), False, "no other index of subjectim is in sharedix"),
        ):
            if found != expected:
                raise DataError(f"NSD's design contradicts itself: {what}.", where=str(path), found=found)
        return Experiment(image_id, order, is_test, trials_per_session)


def num_pictures(path: Path) -> int:
    """Return how many pictures the stimulus file holds.

    Raises:
        DataError: it is missing or damaged.
    """
    if not path.is_file():
        raise DataError("NSD's pictures are missing.", where=str(path), todo=FETCH)
    with reading(path, "The file of NSD's pictures"), open_hdf5(path) as file:
        return int(file["imgBrick"].shape[0])
