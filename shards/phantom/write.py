"""Writes a phantom: a small made-up data set in NSD's own file formats and folders, or in LAION-fMRI's.

Deterministic (the bytes depend on settings and seed), atomic per file, and resumable: sessions that exist are kept,
and ``phantom.json``, written last, says that everything is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from nd_dist.config import PhantomConfig
from nd_dist.errors import ConfigError
from nd_dist.files import atomic_path, read_json, write_bytes, write_json, write_text
from shards.phantom import laion_fmri, tables
from shards.phantom.design import PhantomDesign, count_images, make_design
from shards.phantom.features import picture_features
from shards.phantom.nifti import write_nifti
from shards.phantom.pictures import PictureWorld
from shards.phantom.subjects import SimulatedSubject
from shards.sources.betas import HDF5_DATASET
from shards.sources.coco import SPLITS, captions_path
from shards.sources.nsd_layout import PHANTOM_RECORD, PHANTOM_STARTED, NsdLayout

BETAS_VERSION = "betas_fithrf_GLMdenoise_RR"
ROI = "nsdgeneral"
EARLY_ROI, HIGHER_ROI = "prf-visualrois", "streams"
GROUPS, CLASSES = "image_groups.json", "image_classes.json"
GROUP_NAMES = {"combination": "held-out combinations", "object": "held-out objects"}
FORMAT = 1


class PhantomSummary(BaseModel):
    """What a phantom holds: a part of its record."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    out_dir: Path
    """Its folder, to be used as ``nsd_root``."""
    num_images: int
    """Different pictures."""
    num_shared: int
    """Test pictures."""
    num_voxels: dict[int, int]
    """Subject -> voxels of ``nsdgeneral``."""
    num_sessions: dict[int, int]
    """Subject -> sessions."""
    trials_per_session: int
    """Trials in a session."""
    num_trials: int | None = None
    """Trials of all subjects, where sessions differ in theirs."""
    is_new: bool
    """False where a complete phantom of these settings was there already."""

    def describe(self) -> str:
        """Return one line for people."""
        trials = self.num_trials or sum(self.num_sessions.values()) * self.trials_per_session
        voxels = ", ".join(str(count) for count in self.num_voxels.values())
        state = "written" if self.is_new else "there already"
        return (
            f"{len(self.num_voxels)} simulated subjects ({voxels} voxels), {trials:,} trials, {self.num_images:,} "
            f"pictures, {self.num_shared} of them shared; {state}"
        )


def write_phantom(out_dir: Path, config: PhantomConfig, seed: int) -> PhantomSummary:
    """Write a phantom into ``out_dir``; nothing is to be done where it is complete already.

    Args:
        out_dir: New folder, or one that holds (a part of) the same phantom.
        config: Layout, counts and noise ceiling.
        seed: Everything random derives from it.

    Raises:
        ConfigError: the folder holds something else, or the settings contradict each other.
        DataError: a file cannot be written.
    """
    is_nsd = config.layout == "nsd"
    kept = config.model_dump(mode="json", exclude={"layout"} if is_nsd else None)
    settings = {"format": FORMAT, "seed": seed, "phantom": kept}
    count_images(config) if is_nsd else laion_fmri.make_design(config, seed)
    if not _begin(out_dir, settings):
        return _summary(out_dir, is_new=False)
    facts = _write_nsd(out_dir, config, seed) if is_nsd else laion_fmri.write(out_dir, config, seed)
    write_json(out_dir / PHANTOM_RECORD, {"settings": settings, **facts})
    (out_dir / PHANTOM_STARTED).unlink()
    return _summary(out_dir, is_new=True)


def _write_nsd(out_dir: Path, config: PhantomConfig, seed: int) -> dict[str, object]:
    """Write a phantom NSD and return its facts."""
    world = PictureWorld(seed, count_images(config), config.num_shared)
    design = make_design(config, seed, world.shared_ids)
    layout = NsdLayout(out_dir)
    pictures_NHWC = np.stack([world.picture(image_id) for image_id in range(world.num_images)])
    _write_stimuli(layout.stimuli, pictures_NHWC)
    _write_tables(layout, out_dir / "captions", design, world, seed)
    write_json(out_dir / GROUPS, image_groups(world))
    write_json(out_dir / CLASSES, image_classes(world))
    features = picture_features(pictures_NHWC, [world.scene(image_id) for image_id in range(world.num_images)])
    num_voxels = {}
    for subject in range(1, config.num_subjects + 1):
        seen = np.unique(design.subject_images[subject - 1])
        simulated = SimulatedSubject(config, seed, subject, features, seen)
        _write_subject(layout, simulated, design, subject)
        write_text(layout.responses(subject), tables.responses_text(design, subject))
        num_voxels[str(subject)] = simulated.brain.num_voxels
    return {
        "about": "A made-up data set in NSD's file formats; every beta is simulated.",
        "num_images": world.num_images,
        "num_shared": config.num_shared,
        "num_voxels": num_voxels,
        "num_sessions": {str(subject): count for subject, count in enumerate(design.num_sessions, 1)},
        "trials_per_session": config.trials_per_session,
        "held_out": {str(image_id): world.scene(image_id).held_out for image_id in world.shared_ids},
    }


def image_groups(world: PictureWorld) -> dict[str, list[int]]:
    """Return the groups of test pictures that an evaluation reports apart: name -> image ids."""
    return {
        name: [image_id for image_id in world.shared_ids if world.scene(image_id).held_out == kind]
        for kind, name in GROUP_NAMES.items()
    }


def image_classes(world: PictureWorld) -> dict[str, list[int]]:
    """Return super-class -> images whose main thing is of it."""
    found: dict[str, list[int]] = {}
    for image_id in range(world.num_images):
        found.setdefault(world.scene(image_id).things[0].super_class, []).append(image_id)
    return dict(sorted(found.items()))


def _begin(out_dir: Path, settings: Mapping[str, object]) -> bool:
    """Mark a folder as this phantom's; return False where the phantom is complete.

    Raises:
        ConfigError: the folder holds another phantom or other files.
    """
    record, started = out_dir / PHANTOM_RECORD, out_dir / PHANTOM_STARTED
    for path in (record, started):
        if path.exists():
            content = read_json(path)
            if content.get("settings") != settings:
                raise ConfigError(
                    "This folder holds a phantom of other settings.",
                    where=str(path),
                    expected=settings,
                    found=content.get("settings"),
                    todo="choose another folder, or delete this one",
                )
            return path == started
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(
            "A phantom needs a folder of its own.", where=str(out_dir), todo="choose a new or empty folder"
        )
    write_json(started, {"settings": settings})
    return True


def _summary(out_dir: Path, is_new: bool) -> PhantomSummary:
    """Return the summary of a complete phantom."""
    return PhantomSummary(out_dir=out_dir, is_new=is_new, **read_json(out_dir / PHANTOM_RECORD))


def _write_stimuli(path: Path, pictures_NHWC: npt.NDArray[np.uint8]) -> None:
    """Write ``nsd_stimuli.hdf5``."""
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        file.create_dataset("imgBrick", data=pictures_NHWC, chunks=(1, *pictures_NHWC.shape[1:]))


def _write_tables(
    layout: NsdLayout, captions_dir: Path, design: PhantomDesign, world: PictureWorld, seed: int
) -> None:
    """Write design, picture table and captions."""
    coco = tables.coco_ids(seed, world.num_images)
    write_bytes(layout.expdesign, tables.expdesign_bytes(design))
    write_text(layout.stim_info, tables.stim_info_text(design, coco))
    captions = [world.captions(image_id) for image_id in range(world.num_images)]
    for split in SPLITS:
        text = tables.captions_text(split, range(world.num_images), captions, coco)
        write_text(captions_path(captions_dir, split), text)


def _write_subject(layout: NsdLayout, simulated: SimulatedSubject, design: PhantomDesign, subject: int) -> None:
    """Write a subject's ROIs, noise ceiling, and betas as NIfTI and HDF5."""
    brain = simulated.brain
    labels_XYZ, is_roi = brain.labels, brain.labels > 0
    early_XYZ, higher_XYZ = np.zeros_like(labels_XYZ), np.zeros_like(labels_XYZ)
    voxels = np.arange(brain.num_voxels)
    early_XYZ[is_roi] = np.where(brain.is_early, 1 + voxels % 7, 0)  # 1 .. 7 as V1v .. hV4
    higher_XYZ[is_roi] = np.where(brain.is_early, 1, 5)
    ncsnr_XYZ = np.zeros(brain.grid, dtype=np.float32)
    ncsnr_XYZ[is_roi] = simulated.ncsnr
    for name, volume in ((ROI, labels_XYZ), (EARLY_ROI, early_XYZ), (HIGHER_ROI, higher_XYZ)):
        write_nifti(layout.roi(subject, name), volume)
    write_nifti(layout.ncsnr(subject, BETAS_VERSION), ncsnr_XYZ)
    images = design.images(subject).reshape(-1, design.trials_per_session)
    for session, image_ids in enumerate(images, 1):
        paths = [layout.betas(subject, BETAS_VERSION, session, suffix) for suffix in (".nii.gz", ".hdf5")]
        if all(path.exists() for path in paths):
            continue
        volumes_XYZT = simulated.volumes(session, image_ids)
        write_nifti(paths[0], volumes_XYZT)
        _write_hdf5(paths[1], volumes_XYZT)


def _write_hdf5(path: Path, volumes_XYZT: npt.NDArray[np.int16]) -> None:
    """Write betas as MATLAB does: axes reversed for h5py, one chunk per voxel with all its trials."""
    num_trials = volumes_XYZT.shape[3]
    with atomic_path(path) as part, h5py.File(part, "w", libver="latest") as file:
        file.create_dataset(HDF5_DATASET, data=volumes_XYZT.T, chunks=(num_trials, 1, 1, 1))
