"""A phantom in LAION-fMRI's file formats and folders, with what is uncommon in them.

Subjects 1, 3, 5, ...; shared pictures that are seen more often than others; pictures of objects that are never trained
(out of distribution); an image that lacks a repeat; a subject that lacks a run, and one that lacks a ROI; voxels that
are NaN in a session or in one trial; a ROI with a voxel outside the brain, and every ROI on another grid as well; a
session of integers with a scale; a session of another experiment; pictures as JPEG, and as PNG with transparency; two
pictures that show nearly the same; the splits of the package.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from nd_dist.config import PhantomConfig
from nd_dist.errors import ConfigError
from nd_dist.files import atomic_path, write_json, write_text
from nd_dist.seeds import unit_seed
from shards.phantom.backgrounds import PLACES
from shards.phantom.features import picture_features
from shards.phantom.nifti import write_nifti
from shards.phantom.pictures import PictureWorld
from shards.phantom.scenes import Scene
from shards.phantom.subjects import SimulatedSubject
from shards.sources.laion_fmri import as_shown
from shards.sources.laion_fmri_layout import OOD, PARTICIPANTS, SHARED, LaionFmriLayout, kind_of, subject_label

BETAS_VERSION = "glmsingle-tedana"
VOXEL_MM = 1.778
MANY, FEW = 6, 3
"""How often a subject sees an ordinary shared picture, and any other (in LAION-fMRI 12 and 4)."""
NUM_RUNS, NUM_CLUSTERS, NUM_RANDOM = 4, 5, 2
TEST_SHARE = 0.2
LACKS_RUN = LACKS_ROI = 3  # this subject
NAN_VOXELS = 7, 8
"""Of subject 1: NaN throughout session 1, and in one trial of session 2."""
INTEGER_SESSION, SLOPE = 3, 0.01
OLD_LABELS = {1: "sub-01", 3: "sub-04", 5: "sub-03", 6: "sub-02", 7: "sub-05"}  # what split files say of their pool


class Design(NamedTuple):
    """Who sees what.

    Args:
        subjects: Subject numbers.
        num_ordinary: Shared pictures that are not out of distribution.
        num_ood: Shared pictures that are.
        num_own: Pictures that one subject alone sees, of each.
    """

    subjects: tuple[int, ...]
    num_ordinary: int
    num_ood: int
    num_own: int

    @property
    def num_images(self) -> int:
        """All pictures."""
        return self.num_ordinary + self.num_ood + len(self.subjects) * self.num_own


@dataclass(frozen=True)
class _Pictures:
    """All pictures in the order of the metadata table.

    Args:
        names: Name of each.
        scenes: What it shows.
        captions: What people write about it.
        encoded: Its file.
        twins: Rows of two that show nearly the same: a shared one, and one of the first subject's own.
    """

    names: tuple[str, ...]
    scenes: tuple[Scene, ...]
    captions: tuple[tuple[str, ...], ...]
    encoded: tuple[bytes, ...]
    twins: tuple[int, int]

    def rows(self, wanted: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return the rows of names."""
        row_of = {name: row for row, name in enumerate(self.names)}
        return np.array([row_of[name] for name in wanted], dtype=np.int64)

    def pool(self, subject: int | None) -> list[str]:
        """Return the names that a subject's splits are made of (None: the shared ones): all it sees, but no OOD."""
        ending = "" if subject is None else f"_{PARTICIPANTS[subject]}."
        ordinary = [name for name in sorted(self.names) if kind_of(name) != OOD]
        return [name for name in ordinary if name.startswith(SHARED) or (ending and ending in name)]


def make_design(config: PhantomConfig, seed: int) -> Design:
    """Return who sees what.

    Raises:
        ConfigError: too many subjects, or trials that leave no room for pictures that are not shared.
    """
    if config.num_subjects > len(PARTICIPANTS):
        raise ConfigError(
            "LAION-fMRI has five subjects.", where="phantom.num_subjects", expected="1 .. 5", found=config.num_subjects
        )
    num_ood = len([i for i in range(config.num_shared) if i % 4 == 0])  # as PictureWorld deals objects out
    num_ordinary = config.num_shared - num_ood
    left = config.num_sessions * config.trials_per_session - MANY * num_ordinary - FEW * num_ood
    if left < 3 * FEW or config.trials_per_session < 2 * NUM_RUNS + 2:
        raise ConfigError(
            "A phantom needs pictures beyond the shared ones.",
            where="phantom.num_shared",
            expected=f"fewer: ordinary ones are shown {MANY} times, in {config.num_sessions} sessions of "
            f"{config.trials_per_session} trials",
            found=config.num_shared,
        )
    return Design(tuple(PARTICIPANTS)[: config.num_subjects], num_ordinary, num_ood, -(-left // FEW))


def write(out_dir: Path, config: PhantomConfig, seed: int) -> dict[str, object]:
    """Write a phantom and return its facts; files are written anew each time but betas, which cost most."""
    design, layout = make_design(config, seed), LaionFmriLayout(out_dir)
    world = PictureWorld(seed, design.num_images, design.num_ordinary + design.num_ood)
    pictures = _pictures(world, design, seed)
    _write_stimuli(layout, pictures)
    _write_splits(layout, pictures, design, seed)
    shown_NHWC = np.stack([as_shown(content) for content in pictures.encoded])
    features = picture_features(shown_NHWC, pictures.scenes)
    num_voxels, num_trials = {}, 0
    for subject in design.subjects:
        sessions = _trials(pictures, design, config, seed, subject)
        seen = np.unique(np.concatenate([rows for rows, _ in sessions]))
        simulated = SimulatedSubject(config, seed, subject, features, seen)
        _write_anatomy(layout, simulated, subject)
        for session, (rows, runs) in enumerate(sessions, 1):
            _write_session(layout, simulated, subject, session, rows, runs, pictures.names)
        write_text(layout.betas_dir(subject, BETAS_VERSION) / "ses-31/func/README", "another experiment\n")
        num_voxels[str(subject)] = simulated.brain.num_voxels
        num_trials += sum(len(rows) for rows, _ in sessions)
    return {
        "about": "A made-up data set in LAION-fMRI's file formats; every beta is simulated.",
        "num_images": design.num_images,
        "num_shared": design.num_ordinary + design.num_ood,
        "num_voxels": num_voxels,
        "num_sessions": {str(subject): config.num_sessions for subject in design.subjects},
        "trials_per_session": config.trials_per_session,
        "num_trials": num_trials,
    }


def _pictures(world: PictureWorld, design: Design, seed: int) -> _Pictures:
    """Return all pictures in the order of the metadata table, which is none."""
    rng = _rng(seed, "laion-fmri pictures")
    shared = set(world.shared_ids)
    own = iter([image_id for image_id in range(world.num_images) if image_id not in shared])
    ordered = sorted(shared, key=lambda image_id: (world.scene(image_id).held_out, image_id))
    of = {image_id: _shared_name(world.scene(image_id), number) for number, image_id in enumerate(ordered)}
    for subject in design.subjects:
        for number in range(design.num_own):
            image_id = next(own)
            scene, ending = world.scene(image_id), PARTICIPANTS[subject]
            concept = scene.things[0].name.replace(" ", "_")
            cluster = list(PLACES).index(scene.place)
            laion, things = f"LAION_initial_cluster_{cluster}_i{number}", f"THINGS+_{concept}_{number}"
            of[image_id] = f"unique_{things if number % 10 == 9 else laion}_{ending}.jpg"
    ids = rng.permutation(world.num_images).tolist()
    scenes = {image_id: world.scene(image_id) for image_id in ids}
    captions = {image_id: world.captions(image_id) for image_id in ids}
    rgb = {image_id: world.picture(image_id) for image_id in ids}
    first, copy = _twins(of)
    rgb[copy] = np.clip(rgb[first].astype(np.int16) + 3, 0, 255).astype(np.uint8)
    scenes[copy], captions[copy] = scenes[first], captions[first]
    return _Pictures(
        names=tuple(of[image_id] for image_id in ids),
        scenes=tuple(scenes[image_id] for image_id in ids),
        captions=tuple(captions[image_id] for image_id in ids),
        encoded=tuple(_encoded(rgb[image_id], of[image_id]) for image_id in ids),
        twins=(ids.index(first), ids.index(copy)),
    )


def _shared_name(scene: Scene, number: int) -> str:
    """Return the name of a shared picture, which tells what kind it is."""
    cluster, concept = list(PLACES).index(scene.place), scene.things[0].name.replace(" ", "_")
    if scene.held_out == "object":
        kind = "unusual" if len(scene.things) == 1 else "relations"
        return f"shared_4rep_OOD_{kind}_{concept}_{number}.{'png' if number % 2 else 'jpg'}"
    if number % 8 == 1:
        return f"shared_4rep_NSD_special100_{number}.jpg"
    if number % 8 == 2:
        return f"shared_12rep_THINGS+_kmeans_{number}_{concept}.jpg"
    return f"shared_12rep_LAION_cluster_{cluster}_i{number}.jpg"


def _twins(names: Mapping[int, str]) -> tuple[int, int]:
    """Return a shared picture and one of the first subject's own that is made to show nearly the same."""
    shared = sorted(image_id for image_id, name in names.items() if "_LAION_" in name and name.startswith(SHARED))
    own = sorted(image_id for image_id, name in names.items() if name.endswith("_p01.jpg"))
    return shared[0], own[0]


def _encoded(picture_HWC: npt.NDArray[np.uint8], name: str) -> bytes:
    """Return a picture as JPEG, or as PNG with a half-transparent corner."""
    stream = io.BytesIO()
    if name.endswith(".jpg"):
        Image.fromarray(picture_HWC).save(stream, format="JPEG", quality=95, subsampling=0)
    else:
        alpha_HW = np.full(picture_HWC.shape[:2], 255, dtype=np.uint8)
        alpha_HW[:8, :8] = 128
        Image.fromarray(np.dstack([picture_HWC, alpha_HW])).save(stream, format="PNG")
    return stream.getvalue()


def _trials(
    pictures: _Pictures, design: Design, config: PhantomConfig, seed: int, subject: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return the picture's row and the run of every trial, session by session; sessions differ in their number."""
    own = set(pictures.pool(subject)) - set(pictures.pool(None))
    shown = [name for name in pictures.names if name.startswith(SHARED) or name in own]
    repeats = [MANY if name.startswith("shared_12rep") else FEW for name in shown]
    repeats[shown.index(max(own))] -= 1
    order = _rng(seed, "laion-fmri design", subject).permutation(np.repeat(pictures.rows(shown), repeats))
    lengths = np.full(config.num_sessions, config.trials_per_session)
    lengths[0] -= 2
    lengths[-1] += 2
    sessions = []
    for session, rows in enumerate(np.split(order[: lengths.sum()], np.cumsum(lengths)[:-1]), 1):
        runs = np.repeat(np.arange(1, NUM_RUNS + 1), [len(part) for part in np.array_split(rows, NUM_RUNS)])
        is_kept = runs < NUM_RUNS if (subject, session) == (LACKS_RUN, 2) else runs > 0
        sessions.append((rows[is_kept], runs[is_kept]))
    return sessions


def _write_stimuli(layout: LaionFmriLayout, pictures: _Pictures) -> None:
    """Write pictures, their table and captions."""
    with atomic_path(layout.stimuli("stimuli.h5")) as part, h5py.File(part, "w") as file:
        kind = h5py.vlen_dtype(np.uint8)
        images = file.create_dataset("images", shape=(len(pictures.names),), dtype=kind, track_times=False)
        for row, content in enumerate(pictures.encoded):
            images[row] = np.frombuffer(content, dtype=np.uint8)
    table = [["image_name", "dataset", "participant", "unique_or_shared", "n_reps"]]
    texts = [["image_name", "caption_idx", "source", "caption", "origin_collection", "participant_id", "ai_model"]]
    for name, captions in zip(pictures.names, pictures.captions, strict=True):
        words = name.split("_")
        is_shared = words[0] == SHARED
        participant = "" if is_shared else name.rpartition(".")[0].rpartition("_")[2]
        table.append([name, kind_of(name), participant, words[0], words[1] if is_shared else "4rep"])
        if is_shared and kind_of(name) != OOD:
            texts.append([name, "0", "ai", "a sentence of a language model", "", "", "some-model"])
        for number, text in enumerate(captions[: 5 if is_shared else 3], 1):
            quoted = f'{text},\nor "so it seems"' if number == 2 else text
            texts.append([name, str(number), "human", quoted, "main", "x1", ""])
    write_text(layout.stimuli("metadata.csv"), _csv(table))
    write_text(layout.stimuli("desc-captions.csv"), _csv(texts))


def _csv(rows: Sequence[Sequence[str]], delimiter: str = ",") -> str:
    """Return a table as text."""
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _write_splits(layout: LaionFmriLayout, pictures: _Pictures, design: Design, seed: int) -> None:
    """Write the package's splits of every pool, and which pictures show nearly the same."""
    pooled = sorted({name for subject in design.subjects for name in pictures.pool(subject)})
    pools = {SHARED: pictures.pool(None), **{subject_label(s): pictures.pool(s) for s in design.subjects}}
    labels = {SHARED: SHARED, **{subject_label(s): OLD_LABELS[s] for s in design.subjects}, "pooled": "pooled"}
    ood = sorted(name for name in pictures.names if kind_of(name) == OOD)
    for turn, (pool, names) in enumerate([*pools.items(), ("pooled", pooled)]):
        rng = _rng(seed, "laion-fmri splits", pool)
        number = max(1, round(TEST_SHARE * len(names)))
        tests = {"tau": rng.permutation(names)[:number].tolist()}
        for cluster in range(NUM_CLUSTERS):
            places = [p for n, p in enumerate(PLACES) if (n + turn) % NUM_CLUSTERS == cluster]
            scenes = [pictures.scenes[row] for row in pictures.rows(names).tolist()]
            tests[f"cluster_k5_{cluster}"] = [n for n, s in zip(names, scenes, strict=True) if s.place in places]
        if pool != "pooled":
            folds = np.array_split(rng.permutation(names), NUM_CLUSTERS)
            tests |= {f"random_{fold}": sorted(folds[fold].tolist()) for fold in range(NUM_RANDOM)}
            tests["ood"] = ood
        for name, test in tests.items():
            train = [image for image in names if image not in set(test)]
            variant = {"variant_id": 0, "train_ids": train, "test_ids": test}
            counts = {"n_train": len(train), "n_test": len(test)}
            content = {"name": name, "pool": labels[pool], "splitter": "phantom", "params": {}, **counts}
            write_json(layout.splits / pool / f"{name}.json", {**content, "variants": [variant]})
    twins = [pictures.names[row] for row in pictures.twins]
    write_json(layout.splits / "duplicate_groups.json", {"sub-01": [twins]})


def _write_anatomy(layout: LaionFmriLayout, simulated: SimulatedSubject, subject: int) -> None:
    """Write a subject's brain mask, ROIs on two grids, and noise ceiling."""
    brain = simulated.brain
    is_roi_XYZ = brain.labels > 0
    voxels, place_of = np.argwhere(is_roi_XYZ), np.zeros(brain.num_voxels, dtype=np.int64)
    place_of[brain.is_early] = 1 + np.arange(int(brain.is_early.sum())) % 2
    write_nifti(layout.brain_mask(subject), brain.is_brain.astype(np.uint8), VOXEL_MM)
    masks = {("laion", "laiongeneral"): np.ones(brain.num_voxels, dtype=np.bool_)}
    masks |= {("retinotopy", "V1v"): place_of == 1, ("retinotopy", "V1d"): place_of == 2}
    if subject != LACKS_ROI:
        masks["face", "FFA1"] = (place_of == 0) & (np.arange(brain.num_voxels) % 3 == 0)
    for (category, label), is_member in masks.items():
        volume_XYZ = np.zeros(brain.grid, dtype=np.uint8)
        volume_XYZ[tuple(voxels[is_member].T)] = 1
        if label == "laiongeneral":
            volume_XYZ[0, 0, 0] = 1  # a corner, which is no brain
        write_nifti(layout.roi(subject, category, label), volume_XYZ, VOXEL_MM)
        write_nifti(layout.roi(subject, category, label, "1pt5"), np.repeat(volume_XYZ, 2, axis=0), VOXEL_MM / 2)
    ceiling_XYZ = np.zeros(brain.grid, dtype=np.float32)
    share_V = simulated.noise_ceiling_V
    ceiling_XYZ[is_roi_XYZ] = 100 * share_V / (share_V + (1 - share_V) / 12)
    write_nifti(layout.noise_ceiling(subject, BETAS_VERSION), ceiling_XYZ, VOXEL_MM)


def _write_session(
    layout: LaionFmriLayout,
    simulated: SimulatedSubject,
    subject: int,
    session: int,
    rows: npt.NDArray[np.int64],
    runs: npt.NDArray[np.int64],
    names: Sequence[str],
) -> None:
    """Write one session's table of trials and betas."""
    label = f"ses-{session:02d}"
    lines = [
        [label, str(run), str(index), names[row]] for index, (row, run) in enumerate(zip(rows, runs, strict=True))
    ]
    head = ["session", "run", "beta_index", "label"]
    write_text(layout.trials(subject, BETAS_VERSION, session), _csv([head, *lines], "\t"))
    path = layout.betas(subject, BETAS_VERSION, session)
    if path.exists():
        return
    brain = simulated.brain
    betas_TV = simulated.betas(session, rows).astype(np.float32)
    if (subject, session) == (1, 1):
        betas_TV[:, NAN_VOXELS[0]] = np.nan
    if (subject, session) == (1, 2):
        betas_TV[3, NAN_VOXELS[1]] = np.nan
    volumes_XYZT = np.full((*brain.grid, len(rows)), np.nan, dtype=np.float32)
    outside = _rng(0, "laion-fmri outside", subject, session)
    volumes_XYZT[brain.is_brain] = outside.standard_normal((int(brain.is_brain.sum()), len(rows)))
    volumes_XYZT[brain.labels > 0] = betas_TV.T
    if session == INTEGER_SESSION:
        stored = np.clip(np.rint(np.nan_to_num(volumes_XYZT) / SLOPE), -32768, 32767).astype(np.int16)
        write_nifti(path, stored, VOXEL_MM, slope=SLOPE)
    else:
        write_nifti(path, volumes_XYZT, VOXEL_MM)


def _rng(seed: int, *words: int | str) -> np.random.Generator:
    """Return the generator of a named part of a phantom."""
    return np.random.Generator(np.random.PCG64(unit_seed(seed, *words)))
