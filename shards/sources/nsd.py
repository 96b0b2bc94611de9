"""Reads NSD's own files; with ``nsd_layout`` the only code that knows its file names, 1-based ids and tables.

Everything is counted from the files (trials of a session, sessions, shared images), so a part of NSD, all of it, and
a phantom in the same formats read alike. Sources: NSD data manual; the published preprocessing of Brain-Diffuser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.files import sha256_file
from nd_dist.schema import SEMANTIC
from shards.sources.betas import BetasHeader, Roi, read_betas, read_header, read_labels, read_probe
from shards.sources.coco import SPLITS, captions_path, read_captions
from shards.sources.contract import SubjectDesign
from shards.sources.files import Deliveries, open_hdf5, read_columns, reading
from shards.sources.nsd_layout import FETCH, Experiment, NsdLayout, num_pictures

CEILING_TRIALS = 3
"""Trials of an image, over whose mean a noise ceiling is computed."""
_RESPONSES = ("SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID")
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
        self._delivered = Deliveries(config.data.accept)
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
                        todo=f"run `nd fetch captions --to {path.parent}`, or leave c out of data.targets",
                    )
        return reader

    @property
    def source(self) -> Mapping[str, object]:
        """Facts that identify design and pictures."""
        return {
            "reader": "nsd",
            "expdesign_sha256": sha256_file(self._layout.expdesign),
            "num_images": self.num_images,
            "simulated": self._layout.is_phantom,
        }

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design, checked against ROI, responses and the header of every session's betas."""
        experiment = self._experiment
        if not 1 <= subject <= len(experiment.image_id):
            raise DataError(
                f"Subject {subject} is not in NSD's design.",
                where=str(self._layout.expdesign),
                expected=f"1 .. {len(experiment.image_id)}",
                todo="change data.subjects",
            )
        sessions, roi = self._sessions(subject), self.roi(subject)
        required = self._config.max_sessions or len(sessions)
        absent = tuple(s for s in sessions if s > required and self._find_betas(subject, s) is None)
        for number in sessions:
            if number not in absent:
                self._check_session(subject, number, roi)
        num_trials = int(experiment.trials_per_session[: len(sessions)].sum())
        image_id = experiment.image_id[subject - 1, :num_trials]
        if int(image_id.max()) >= self.num_images:
            raise DataError(
                "The design names a picture that the stimulus file does not hold.",
                where=str(self._layout.stimuli),
                expected=f"more than {int(image_id.max())} pictures",
                found=self.num_images,
            )
        session = np.repeat(np.arange(1, len(sessions) + 1), experiment.trials_per_session[: len(sessions)])
        self._check_responses(subject, session, image_id)
        return SubjectDesign(
            subject=subject,
            num_voxels=roi.num_voxels,
            session=session,
            image_id=image_id,
            is_test=experiment.is_test[:num_trials],
            source=self._voxel_facts(subject),
            absent=absent,
        )

    def _voxel_facts(self, subject: int) -> dict[str, object]:
        """Return the facts that identify a subject's voxels."""
        roi, least = self._config.roi, self._config.min_noise_ceiling
        facts: dict[str, object] = {"betas": self._config.betas, "roi": roi}
        facts["roi_sha256"] = sha256_file(self._layout.roi(subject, roi))
        if least:
            facts["roi"] = f"{roi}, noise ceiling at least {least:g} %"
            facts["ncsnr_sha256"] = sha256_file(self._layout.ncsnr(subject, self._config.betas))
        return facts

    def roi(self, subject: int) -> Roi:
        """Return the ROI's voxels, of these the reliable ones where ``data.min_noise_ceiling`` asks.

        Raises:
            DataError: the ROI is missing or empty.
        """
        if subject not in self._rois:
            path, least = self._layout.roi(subject, self._config.roi), self._config.min_noise_ceiling
            labels_XYZ = read_labels(path)
            if least:
                snr_XYZ = read_labels(self._layout.ncsnr(subject, self._config.betas))
                ceiling_XYZ = 100 * snr_XYZ**2 / (snr_XYZ**2 + 1 / CEILING_TRIALS)
                labels_XYZ = np.where(ceiling_XYZ >= least, labels_XYZ, 0)
            roi = Roi.from_labels(labels_XYZ)
            if roi.num_voxels == 0:
                reliable = f" and a noise ceiling of at least {least:g} %" if least else ""
                raise DataError(f"An ROI has no voxel with a positive label{reliable}.", where=str(path))
            self._rois[subject] = roi
        return self._rois[subject]

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return one session's betas (T, V), percent signal change."""
        return read_betas(self._betas_path(subject, session), self.roi(subject))

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255."""
        path = self._layout.stimuli
        with reading(path, "The file of NSD's pictures"), open_hdf5(path) as file:
            bricks = file["imgBrick"]
            pictures_NHWC = np.empty((len(image_ids), *bricks.shape[1:]), dtype=np.uint8)
            for row, image_id in enumerate(image_ids):
                pictures_NHWC[row] = bricks[image_id]
        return pictures_NHWC

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of pictures."""
        missing = [image_id for image_id in image_ids if not self._captions.get(image_id)]
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
        ids, words = read_columns(path, ",", ["nsdId", "cocoId"], ["cocoSplit", "shared1000"])
        shared = ids["nsdId"][[text.strip().lower() in ("true", "1") for text in words["shared1000"]]]
        is_shared = np.unique(self._experiment.image_id[:, self._experiment.is_test])
        if not np.array_equal(np.sort(ids["nsdId"]), np.arange(len(ids["nsdId"]))) or set(shared) != set(is_shared):
            raise DataError(
                "NSD's table of pictures and its design disagree (nsdId counts from 0; shared1000 is the test set).",
                where=str(path),
                expected=f"ids 0 .. {len(ids['nsdId']) - 1}, {len(is_shared)} of them shared as in nsd_expdesign.mat",
                found=f"ids {ids['nsdId'].min()} .. {ids['nsdId'].max()}, {len(shared)} of them shared",
            )
        by_coco_id = read_captions(self._captions_dir, sorted(set(words["cocoSplit"])))
        pairs = zip(ids["nsdId"].tolist(), ids["cocoId"].tolist(), strict=True)
        return {image_id: by_coco_id[coco_id] for image_id, coco_id in pairs if coco_id in by_coco_id}

    def _find_betas(self, subject: int, session: int) -> Path | None:
        """Return the betas file of a session in the wanted format, if there is one."""
        suffixes = _SUFFIXES[self._config.betas_format]
        paths = (self._layout.betas(subject, self._config.betas, session, suffix) for suffix in suffixes)
        return next((path for path in paths if path.is_file()), None)

    def _betas_path(self, subject: int, session: int) -> Path:
        """Return the betas file of a session in the wanted format.

        Raises:
            DataError: there is none.
        """
        if (path := self._find_betas(subject, session)) is not None:
            return path
        suffixes = _SUFFIXES[self._config.betas_format]
        raise DataError(
            f"Subject {subject} has no betas of session {session}.",
            where=str(self._layout.betas(subject, self._config.betas, session, suffixes[0])),
            expected=" or ".join(suffixes),
            todo=f"download it, or set data.max_sessions={session - 1}" if session > 1 else "download it",
        )

    def _sessions(self, subject: int) -> range:
        """Return the sessions that took place: up to the last one with betas or responses.

        Raises:
            DataError: the subject has none.
        """
        folder = self._layout.betas_dir(subject, self._config.betas)
        matches = (re.fullmatch(r"betas_session(\d+)\..*", path.name) for path in folder.glob("betas_session*"))
        found = {int(match[1]) for match in matches if match}
        if not found:
            raise DataError(f"Subject {subject} has no betas.", where=str(folder), todo=f"check data.betas; {FETCH}")
        found |= set(self._responses(subject).get("SESSION", np.array([], dtype=np.int64)).tolist())
        return range(1, min(max(found), len(self._experiment.trials_per_session)) + 1)

    def _check_session(self, subject: int, session: int, roi: Roi) -> None:
        """Refuse betas whose shape is not the ROI's grid and the design's, and those of another session or subject."""
        path = self._betas_path(subject, session)
        expected = BetasHeader(roi.grid, int(self._experiment.trials_per_session[session - 1]))
        if (found := read_header(path)) != expected:
            raise DataError("Betas do not fit ROI and design.", where=str(path), expected=expected, found=found)
        self._delivered.refuse_copy(path, read_probe(path, roi))

    def _responses(self, subject: int) -> dict[str, npt.NDArray[np.int64]]:
        """Return what a subject's responses say of each trial, nothing where the file is absent."""
        path = self._layout.responses(subject)
        return read_columns(path, "\t", _RESPONSES)[0] if path.exists() else {}

    def _check_responses(self, subject: int, session: npt.NDArray[np.int64], image_id: npt.NDArray[np.int64]) -> None:
        """Refuse responses that name another subject, session or picture (1-based) than place and design do."""
        found = self._responses(subject)
        if not found:
            return
        wanted = {"SUBJECT": np.full(len(image_id), subject), "SESSION": session, "73KID": image_id + 1}
        wanted["10KID"] = self._experiment.order[: len(image_id)] + 1
        is_sorted = np.lexsort([found[name] for name in ("TRIAL", "RUN", "SESSION")]) == np.arange(len(found["TRIAL"]))
        problem = "" if is_sorted.all() else f"SESSION, RUN, TRIAL do not count up in trial {is_sorted.argmin()}"
        for name, values in wanted.items():
            told = found[name][: len(values)]
            for trial in np.flatnonzero(told != values[: len(told)])[:1]:
                problem = f"{name} is {told[trial]} instead of {values[trial]} in trial {trial} (0-based)"
        if len(found["TRIAL"]) < len(image_id):
            problem = f"{len(found['TRIAL'])} trials"
        if problem:
            raise DataError(
                "Responses and design disagree about the trials.",
                where=str(self._layout.responses(subject)),
                expected=f"{len(image_id)} trials as in nsd_expdesign.mat",
                found=problem,
            )
