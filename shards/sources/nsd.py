"""Reads NSD's own files; with ``nsd_layout`` the only code that knows its file names, 1-based ids and tables.

Everything is counted from the files (trials of a session, sessions, shared images), so a part of NSD, all of it, and
a phantom in the same formats read alike. Sources: NSD data manual; the published preprocessing of Brain-Diffuser.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.files import sha256_file
from nd_dist.schema import SEMANTIC
from shards.sources.betas import BetasHeader, Roi, read_betas, read_header, read_labels
from shards.sources.coco import SPLITS, captions_path, read_captions
from shards.sources.contract import SubjectDesign
from shards.sources.nsd_layout import Experiment, NsdLayout, num_pictures

_SUFFIXES = {"hdf5": (".hdf5",), "nifti": (".nii.gz", ".nii"), "auto": (".hdf5", ".nii.gz", ".nii")}


class NsdReader:
    """Reads NSD; made by ``open``, which checks that everything needed exists.

    Args:
        config: The recipe (``nsd_root`` and ``data``).
        experiment: NSD's design.
        num_images: Pictures in the stimulus file.
    """

    def __init__(self, config: Config, experiment: Experiment, num_images: int) -> None:
        self._layout = NsdLayout(config.nsd_root)
        self._config = config.data
        self._captions_dir = Path(config.data.captions.replace("${nsd_root}", str(config.nsd_root)))
        self._experiment = experiment
        self._rois: dict[int, Roi] = {}
        self.num_images = num_images

    @classmethod
    def open(cls, config: Config) -> NsdReader:
        """Return the reader after looking for every file that packing will need.

        Raises:
            DataError: what is missing, where it was expected, and what to do.
        """
        layout = NsdLayout(config.nsd_root)
        experiment = Experiment.read(layout.expdesign)
        reader = cls(config, experiment, num_pictures(layout.stimuli))
        if SEMANTIC in config.data.targets:
            for path in (layout.stim_info, *(captions_path(reader._captions_dir, split) for split in SPLITS)):
                if not path.is_file():
                    raise DataError(
                        "A file that captions need is missing (NSD does not ship COCO's captions).",
                        where=str(path),
                        todo="download COCO's annotations_trainval2017 and set data.captions, or leave c out of "
                        "data.targets",
                    )
        return reader

    @property
    def source(self) -> Mapping[str, object]:
        """Facts that identify design and pictures."""
        return {
            "reader": "nsd",
            "expdesign_sha256": sha256_file(self._layout.expdesign),
            "num_images": self.num_images,
        }

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design, checked against ROI, responses and the header of every session's betas.

        Raises:
            DataError: a session is missing or does not fit.
        """
        experiment = self._experiment
        if not 1 <= subject <= len(experiment.image_id):
            raise DataError(
                f"Subject {subject} is not in NSD's design.",
                where=str(self._layout.expdesign),
                expected=f"1 .. {len(experiment.image_id)}",
                todo="change data.subjects",
            )
        sessions = self._sessions(subject)
        roi = self.roi(subject)
        for session in sessions:
            self._check_session(subject, session, roi)
        num_trials = int(experiment.trials_per_session[: len(sessions)].sum())
        image_id = experiment.image_id[subject - 1, :num_trials]
        if int(image_id.max()) >= self.num_images:
            raise DataError(
                "The design names a picture that the stimulus file does not hold.",
                where=str(self._layout.stimuli),
                expected=f"more than {int(image_id.max())} pictures",
                found=self.num_images,
            )
        self._check_responses(subject, image_id)
        return SubjectDesign(
            subject=subject,
            num_voxels=roi.num_voxels,
            session=np.repeat(np.arange(1, len(sessions) + 1), experiment.trials_per_session[: len(sessions)]),
            image_id=image_id,
            is_test=experiment.is_test[:num_trials],
            source={
                "betas": self._config.betas,
                "roi": self._config.roi,
                "roi_sha256": sha256_file(self._layout.roi(subject, self._config.roi)),
            },
        )

    def roi(self, subject: int) -> Roi:
        """Return the ROI's voxels.

        Raises:
            DataError: the ROI is missing or empty.
        """
        if subject not in self._rois:
            path = self._layout.roi(subject, self._config.roi)
            roi = Roi.from_labels(read_labels(path))
            if roi.num_voxels == 0:
                raise DataError("An ROI has no voxel with a positive label.", where=str(path))
            self._rois[subject] = roi
        return self._rois[subject]

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return one session's betas (T, V), percent signal change."""
        return read_betas(self._betas_path(subject, session), self.roi(subject))

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255.

        Raises:
            DataError: the stimulus file is damaged.
        """
        path = self._layout.stimuli
        try:
            with h5py.File(path, "r") as file:
                bricks = file["imgBrick"]
                pictures_NHWC = np.empty((len(image_ids), *bricks.shape[1:]), dtype=np.uint8)
                for row, image_id in enumerate(image_ids):
                    pictures_NHWC[row] = bricks[image_id]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise DataError("NSD's pictures cannot be read.", where=str(path), found=str(error)) from error
        return pictures_NHWC

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of pictures.

        Raises:
            DataError: a picture has no caption.
        """
        missing = [image_id for image_id in image_ids if image_id not in self._captions]
        if missing:
            raise DataError(
                "COCO's annotation files hold no caption for some of NSD's pictures.",
                where=str(self._captions_dir),
                found=f"{len(missing)} pictures, e.g. image {missing[0]}",
                todo="use the 2017 annotations (train and val)",
            )
        return [self._captions[image_id] for image_id in image_ids]

    @cached_property
    def _captions(self) -> dict[int, tuple[str, ...]]:
        """0-based image id -> captions."""
        path = self._layout.stim_info
        try:
            with open(path, newline="", encoding="utf-8") as stream:
                rows = [(int(row["nsdId"]), int(row["cocoId"]), row["cocoSplit"]) for row in csv.DictReader(stream)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("NSD's table of pictures cannot be read.", where=str(path), found=str(error)) from error
        by_coco_id = read_captions(self._captions_dir, sorted({split for _, _, split in rows}))
        return {image_id: by_coco_id[coco_id] for image_id, coco_id, _ in rows if coco_id in by_coco_id}

    def _betas_path(self, subject: int, session: int) -> Path:
        """Return the betas file of a session in the wanted format.

        Raises:
            DataError: there is none.
        """
        suffixes = _SUFFIXES[self._config.betas_format]
        paths = [self._layout.betas(subject, self._config.betas, session, suffix) for suffix in suffixes]
        for path in paths:
            if path.is_file():
                return path
        raise DataError(
            f"Subject {subject} has no betas of session {session}.",
            where=str(paths[0]),
            expected=" or ".join(suffixes),
            todo=f"download it, or set data.max_sessions={session - 1}" if session > 1 else "download it",
        )

    def _sessions(self, subject: int) -> range:
        """Return the sessions to pack: those with betas or responses, at most ``data.max_sessions``.

        Raises:
            DataError: the subject has none.
        """
        folder = self._layout.betas_dir(subject, self._config.betas)
        matches = (re.fullmatch(r"betas_session(\d+)\..*", path.name) for path in folder.glob("betas_session*"))
        found = {int(match[1]) for match in matches if match}
        found |= {int(row["SESSION"]) for row in self._response_rows(subject)}
        if not found:
            raise DataError(
                f"Subject {subject} has no betas.", where=str(folder), todo="check nsd_root and data.betas"
            )
        available = len(self._experiment.trials_per_session)
        return range(1, min(max(found), self._config.max_sessions or available, available) + 1)

    def _check_session(self, subject: int, session: int, roi: Roi) -> None:
        """Refuse betas whose shape is not the ROI's grid and the design's number of trials."""
        path = self._betas_path(subject, session)
        expected = BetasHeader(roi.grid, int(self._experiment.trials_per_session[session - 1]))
        if (found := read_header(path)) != expected:
            raise DataError("Betas do not fit ROI and design.", where=str(path), expected=expected, found=found)

    def _response_rows(self, subject: int) -> list[dict[str, str]]:
        """Return the rows of a subject's responses, none where the file is absent."""
        path = self._layout.responses(subject)
        if not path.is_file():
            return []
        with open(path, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream, delimiter="\t"))

    def _check_responses(self, subject: int, image_id: npt.NDArray[np.int64]) -> None:
        """Refuse responses whose 1-based ``73KID`` is not the design's image."""
        rows = self._response_rows(subject)
        if not rows:
            return
        shown = np.array([int(row["73KID"]) - 1 for row in rows[: len(image_id)]])
        if len(shown) != len(image_id) or (shown != image_id).any():
            raise DataError(
                "Responses and design disagree about the pictures shown.",
                where=str(self._layout.responses(subject)),
                expected=f"{len(image_id)} trials as in nsd_expdesign.mat",
                found=f"{len(shown)} trials"
                if len(shown) != len(image_id)
                else f"first difference in trial {int(np.flatnonzero(shown != image_id)[0])} (0-based)",
            )
