"""Reads LAION-fMRI (Zerbe and others, 2026): single-trial betas as NIfTI, a table of trials a session, pictures.

With ``laion_fmri_layout`` the only code that knows its names. Betas are GLMsingle's, neither percent signal change nor
comparable across voxels, so they are taken as they are; z-scoring is the packer's. A file that is not as the published
description says is refused and named, and nothing is guessed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.files import hash_json, sha256_file
from nd_dist.schema import SEMANTIC
from shards.sources.betas import BetasHeader, Roi, read_affine, read_betas, read_header, read_labels, read_probe
from shards.sources.contract import ImageSets, SubjectDesign
from shards.sources.files import Deliveries, open_hdf5, read_columns, reading
from shards.sources.laion_fmri_layout import (
    FETCH,
    NUM_RUNS,
    NUM_SESSIONS,
    PARTICIPANTS,
    ImageTable,
    LaionFmriLayout,
    subject_label,
)

GREY = (128, 128, 128)
"""What stood behind transparent pictures when they were shown."""


class LaionFmriReader:
    """Reads LAION-fMRI; made by ``open``, which checks that everything needed exists.

    Args:
        config: The recipe (``nsd_root`` and ``data``).
        images: The table of images.
    """

    def __init__(self, config: Config, images: ImageTable) -> None:
        self._layout, self._config, self._images = LaionFmriLayout(config.nsd_root), config.data, images
        self._rois: dict[int, Roi] = {}
        self._picture_shape: tuple[int, ...] = ()
        self._delivered = Deliveries(config.data.accept)
        self.num_images = len(images.names)

    @classmethod
    def open(cls, config: Config) -> LaionFmriReader:
        """Return the reader after looking for pictures, their table and captions.

        Raises:
            DataError: what is missing, where it was expected, and what to do.
        """
        layout = LaionFmriLayout(config.nsd_root)
        reader = cls(config, ImageTable(layout))
        with reading(path := layout.stimuli("stimuli.h5"), "The file of pictures"), open_hdf5(path) as file:
            count = len(file["images"])
        if count != reader.num_images:
            raise DataError(
                "There are not as many pictures as images in their table.",
                where=str(path),
                expected=reader.num_images,
                found=count,
            )
        if SEMANTIC in config.data.targets:
            _ = reader._captions
        return reader

    @property
    def source(self) -> Mapping[str, object]:
        """Facts that identify design and pictures."""
        facts = {"reader": "laion_fmri", "metadata_sha256": self._images.sha256, "num_images": self.num_images}
        return {**facts, "simulated": self._layout.is_phantom}

    @cached_property
    def image_sets(self) -> ImageSets:
        """The package's splits (where they were copied to ``splits``), kinds of images, duplicates."""
        return self._images.image_sets()

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design, checked against ROI and the header of every session's betas."""
        if subject not in PARTICIPANTS:
            raise DataError(
                f"LAION-fMRI has no subject {subject}.",
                where="data.subjects",
                expected=", ".join(map(str, PARTICIPANTS)),
                todo="change data.subjects",
            )
        sessions, roi = self._sessions(subject), self.roi(subject)
        required = self._config.max_sessions or len(sessions)
        images = [self._read_trials(subject, session) for session in sessions]
        absent = tuple(s for s in sessions if s > required and not self._betas_path(subject, s).is_file())
        for session, image_id in zip(sessions, images, strict=True):
            if session not in absent:
                self._check_session(subject, session, roi, len(image_id))
        image_id = np.concatenate(images)
        return SubjectDesign(
            subject=subject,
            num_voxels=roi.num_voxels,
            session=np.repeat(np.array(sessions), [len(part) for part in images]),
            image_id=image_id,
            is_test=self._images.is_shared[image_id],
            source=self._voxel_facts(subject),
            absent=absent,
            name=subject_label(subject),
        )

    def roi(self, subject: int) -> Roi:
        """Return the voxels of ``data.roi`` that are brain, and reliable enough where ``data.min_noise_ceiling`` asks.

        Raises:
            DataError: a file is missing or on another grid, or no voxel is left.
        """
        if subject not in self._rois:
            mask_path = self._layout.brain_mask(subject)
            is_brain_XYZ = read_labels(mask_path) > 0
            is_roi_XYZ = np.zeros_like(is_brain_XYZ)
            for path in self._roi_paths(subject):
                is_roi_XYZ |= self._on_grid(path, mask_path) > 0
            is_roi_XYZ &= is_brain_XYZ
            if self._config.min_noise_ceiling:
                is_roi_XYZ &= self._noise_ceiling(subject) >= self._config.min_noise_ceiling
            if not is_roi_XYZ.any():
                raise DataError(
                    f"No voxel of subject {subject} is chosen.",
                    where=f"data.roi={self._config.roi}, data.min_noise_ceiling={self._config.min_noise_ceiling:g}",
                    expected="voxels that are positive in ROI and brain mask",
                )
            self._rois[subject] = Roi.from_labels(is_roi_XYZ.astype(np.float32))
        return self._rois[subject]

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return one session's betas (T, V) in GLMsingle's unit; NaN where the data set has none."""
        return read_betas(self._betas_path(subject, session), self.roi(subject), integer_scale=None)

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255, as they were shown."""
        path = self._layout.stimuli("stimuli.h5")
        with reading(path, "The file of pictures"), open_hdf5(path) as file:
            contents = [bytes(np.asarray(file["images"][image_id], dtype=np.uint8)) for image_id in image_ids]
            shown = [as_shown(content) for content in contents]
        self._picture_shape = self._picture_shape or shown[0].shape
        for image_id, picture_HWC in zip(image_ids, shown, strict=True):
            if picture_HWC.shape != self._picture_shape:
                name, expected = self._images.names[image_id], self._picture_shape
                what = f"Pictures differ in size: {name}."
                raise DataError(what, where=str(path), expected=expected, found=picture_HWC.shape)
        return np.stack(shown)

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of pictures that people wrote, best first."""
        if missing := [image_id for image_id in image_ids if image_id not in self._captions]:
            raise DataError(
                "A picture has no caption by people.",
                where=str(self._layout.stimuli("desc-captions.csv")),
                found=f"{len(missing)} pictures, e.g. {self._images.names[missing[0]]}",
            )
        return [self._captions[image_id] for image_id in image_ids]

    @cached_property
    def _captions(self) -> dict[int, tuple[str, ...]]:
        """0-based image id -> captions."""
        return self._images.captions()

    def _betas_path(self, subject: int, session: int) -> Path:
        return self._layout.betas(subject, self._config.betas, session)

    def _sessions(self, subject: int) -> range:
        """Return the sessions up to the last one with betas or a table of trials.

        Raises:
            DataError: the subject has none.
        """
        folder = self._layout.betas_dir(subject, self._config.betas)
        files = [path for path in folder.glob("ses-*/func/*SingletrialBetas*") if path.suffix in (".gz", ".tsv")]
        numbers = {int(match[1]) for path in files if (match := re.fullmatch(r"ses-(\d+)", path.parent.parent.name))}
        if not (found := [number for number in numbers if 1 <= number <= NUM_SESSIONS]):
            raise DataError(
                f"Subject {subject} has no betas.",
                where=str(folder),
                todo=f"check nsd_root and data.betas (LAION-fMRI's are in glmsingle-tedana); {FETCH}",
            )
        return range(1, max(found) + 1)

    def _read_trials(self, subject: int, session: int) -> npt.NDArray[np.int64]:
        """Return the image (T,) of a session's trials.

        Raises:
            DataError: the table is missing, contradicts its place, or names another subject's images.
        """
        path = self._layout.trials(subject, self._config.betas, session)
        numbers, words = read_columns(path, "\t", ["run", "beta_index"], ["session", "label"])
        count, runs = len(words["label"]), numbers["run"]
        image_id = self._images.ids_of(words["label"], path)
        is_own = self._images.seen_by(subject)[image_id]
        for is_right, expected, found in (
            (set(words["session"]) == {f"ses-{session:02d}"}, f"session ses-{session:02d}", set(words["session"])),
            ((numbers["beta_index"] == np.arange(count)).all(), f"beta_index 0 .. {count - 1}", "another order"),
            (runs.min() >= 1 and runs.max() <= NUM_RUNS, f"runs 1 .. {NUM_RUNS}", f"{runs.min()} .. {runs.max()}"),
            ((np.diff(runs) >= 0).all(), "runs in order", "a run before an earlier one"),
            (
                is_own.all(),
                f"images that are shared, or end in _{PARTICIPANTS[subject]}",
                words["label"][int(is_own.argmin())],
            ),
        ):
            if not is_right:
                raise DataError(
                    "A table of trials is not as expected.", where=str(path), expected=expected, found=found
                )
        return image_id

    def _check_session(self, subject: int, session: int, roi: Roi, num_trials: int) -> None:
        """Refuse betas that are missing, or whose grid or number differ from ROI and table, or another file's.

        Raises:
            DataError: see above.
        """
        path = self._betas_path(subject, session)
        if not path.is_file():
            raise DataError(
                f"Subject {subject} has no betas of session {session}.",
                where=str(path),
                todo=f"download it, or set data.max_sessions={session - 1}" if session > 1 else "download it",
            )
        if (found := read_header(path)) != (expected := BetasHeader(roi.grid, num_trials)):
            raise DataError(
                "Betas do not fit ROI and table of trials.", where=str(path), expected=expected, found=found
            )
        self._require_affine(path, self._layout.brain_mask(subject))
        self._delivered.refuse_copy(path, read_probe(path, roi))

    def _roi_paths(self, subject: int) -> list[Path]:
        """Return the ROIs that ``data.roi`` names: labels, categories, or all, joined by ``+``.

        Raises:
            DataError: the subject has no such ROI.
        """
        known, chosen = self._layout.rois(subject), []
        for word in self._config.roi.split("+"):
            found = [path for path, names in known.items() if word == "all" or word in names]
            if not found:
                raise DataError(
                    f"Subject {subject} has no ROI {word!r}.",
                    where=str(self._layout.rois_dir(subject)),
                    expected=", ".join(sorted({name for names in known.values() for name in names})) or "ROIs",
                    todo="change data.roi (subjects differ in their ROIs), or download them",
                )
            chosen += found
        return sorted(set(chosen))

    def _noise_ceiling(self, subject: int) -> npt.NDArray[np.floating]:
        """Return the noise ceiling of the mean of twelve trials (X, Y, Z), percent.

        Raises:
            DataError: the map is missing, on another grid, or not in percent.
        """
        path = self._layout.noise_ceiling(subject, self._config.betas)
        ceiling_XYZ = np.nan_to_num(self._on_grid(path, self._layout.brain_mask(subject)), nan=0.0)
        low, high = float(ceiling_XYZ.min()), float(ceiling_XYZ.max())
        if not (low >= 0 and 1 < high <= 100):
            raise DataError(
                "A map of noise ceilings is not in percent.",
                where=str(path),
                expected="0 .. 100, some above 1",
                found=f"{low:g} .. {high:g}",
            )
        return np.asarray(ceiling_XYZ)

    def _voxel_facts(self, subject: int) -> dict[str, object]:
        """Return the facts that identify a subject's voxels."""
        paths = [*self._roi_paths(subject), self._layout.brain_mask(subject)]
        facts: dict[str, object] = {"betas": self._config.betas, "roi": self._config.roi}
        if self._config.min_noise_ceiling:
            facts["min_noise_ceiling"] = self._config.min_noise_ceiling
            paths.append(self._layout.noise_ceiling(subject, self._config.betas))
        return {**facts, "voxels_sha256": hash_json([[path.name, sha256_file(path)] for path in paths])}

    def _on_grid(self, path: Path, mask_path: Path) -> npt.NDArray[np.floating]:
        """Return a volume (X, Y, Z) that must be on the brain mask's grid.

        Raises:
            DataError: it is on another.
        """
        volume_XYZ, mask_XYZ = read_labels(path), read_labels(mask_path)
        if volume_XYZ.shape != mask_XYZ.shape:
            raise DataError(
                "A volume is not on the brain mask's grid.",
                where=str(path),
                expected=mask_XYZ.shape,
                found=volume_XYZ.shape,
            )
        self._require_affine(path, mask_path)
        return volume_XYZ

    def _require_affine(self, path: Path, mask_path: Path) -> None:
        """Refuse a volume whose voxels lie elsewhere than the brain mask's.

        Raises:
            DataError: they do.
        """
        found, expected = read_affine(path), read_affine(mask_path)
        if not np.allclose(found, expected, atol=1e-3):
            raise DataError(
                "The voxels of a volume lie elsewhere than the brain mask's.",
                where=str(path),
                expected=np.round(expected, 3).tolist(),
                found=np.round(found, 3).tolist(),
            )


def as_shown(content: bytes) -> npt.NDArray[np.uint8]:
    """Return an encoded picture (H, W, 3), transparent parts over grey."""
    with Image.open(io.BytesIO(content)) as picture:
        if "A" not in picture.getbands() and "transparency" not in picture.info:
            return np.asarray(picture.convert("RGB"))
        ground = Image.new("RGBA", picture.size, (*GREY, 255))
        return np.asarray(Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB"))
