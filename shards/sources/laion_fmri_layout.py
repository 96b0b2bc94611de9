"""Where LAION-fMRI keeps its files, and what its tables say: images, trials, captions, splits, duplicates.

Source: documentation and splits of the package ``laion_fmri`` (ViCCo-Group/LAION-fMRI), 2026. Images are known by
their name; our image id is the 0-based row of the metadata table, which is also the row of the pictures' file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.errors import DataError
from nd_dist.files import read_json, sha256_file
from shards.sources.contract import ImageSets, SplitImages
from shards.sources.files import read_columns, reading

PARTICIPANTS = {1: "p01", 3: "p04", 5: "p03", 6: "p02", 7: "p05"}
"""Subject -> how the names of its unique images end; there is no subject 2 or 4."""
NUM_SESSIONS = 30
"""Sessions that show pictures to be reconstructed; later folders hold other experiments."""
NUM_RUNS = 12
SHARED, UNIQUE = "shared", "unique"
OOD = "OOD"
KINDS = ("LAION", "THINGS+", "THINGS", "NSD", OOD)
FETCH = "`nd fetch laion-fmri --to DIR` prints the commands that download it"
PHANTOM_RECORD, PHANTOM_STARTED = "phantom.json", ".phantom-started.json"


@dataclass(frozen=True)
class LaionFmriLayout:
    """Where LAION-fMRI keeps its files.

    Args:
        root: Folder that holds ``derivatives``, ``stimuli`` and, copied from the package, ``splits``.
    """

    root: Path

    @property
    def is_phantom(self) -> bool:
        """Whether `nd phantom` made this data set up."""
        return any((self.root / name).exists() for name in (PHANTOM_RECORD, PHANTOM_STARTED))

    def stimuli(self, name: str) -> Path:
        """A file about the pictures: ``stimuli.h5``, ``metadata.csv``, ``desc-captions.csv``."""
        return self.root / f"stimuli/task-images_{name}"

    @property
    def splits(self) -> Path:
        """Folder of the package's split files, ``<pool>/<name>.json``."""
        return self.root / "splits"

    def betas_dir(self, subject: int, version: str) -> Path:
        """The folder of a subject's betas."""
        return self.root / f"derivatives/{version}/{subject_label(subject)}"

    def betas(self, subject: int, version: str, session: int) -> Path:
        """One session's betas (X, Y, Z, T)."""
        description = "space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz"
        return self._of_session(subject, version, session, description)

    def trials(self, subject: int, version: str, session: int) -> Path:
        """The table of one session's trials (TSV)."""
        return self._of_session(subject, version, session, "desc-SingletrialBetas_trials.tsv")

    def noise_ceiling(self, subject: int, version: str) -> Path:
        """The noise ceiling of the mean of twelve trials, percent."""
        label = subject_label(subject)
        return (
            self.betas_dir(subject, version) / f"{label}_task-images_space-T1w_desc-Noiseceiling12rep_statmap.nii.gz"
        )

    def brain_mask(self, subject: int) -> Path:
        """Which voxels of the betas' grid are brain."""
        session = f"{subject_label(subject)}/ses-PrismaAnat"
        stem = f"{subject_label(subject)}_ses-PrismaAnat_space-T1w_res-1pt8_desc-brain_mask.nii.gz"
        return self.root / "derivatives/anatomical" / session / "anat" / stem

    def rois_dir(self, subject: int) -> Path:
        """The folder of a subject's ROIs, a folder for each category."""
        return self.root / f"derivatives/rois/{subject_label(subject)}"

    def roi(self, subject: int, category: str, label: str, resolution: str = "1pt8") -> Path:
        """One ROI on the betas' grid, or on another."""
        stem = f"{subject_label(subject)}_space-T1w_res-{resolution}_label-{label}_mask.nii.gz"
        return self.rois_dir(subject) / category / stem

    def rois(self, subject: int) -> dict[Path, tuple[str, str]]:
        """Return path -> (category, label) of every ROI on the betas' grid."""
        paths = sorted(self.rois_dir(subject).glob("*/*_space-T1w_res-1pt8_label-*_mask.nii.gz"))
        return {
            path: (path.parent.name, path.name.partition("label-")[2].removesuffix("_mask.nii.gz")) for path in paths
        }

    def _of_session(self, subject: int, version: str, session: int, description: str) -> Path:
        names = subject_label(subject), f"ses-{session:02d}"
        return self.betas_dir(subject, version) / names[1] / "func" / f"{'_'.join(names)}_task-images_{description}"


def subject_label(subject: int) -> str:
    """Return LAION-fMRI's name of a subject: 3 -> ``sub-03``."""
    return f"sub-{subject:02d}"


def kind_of(name: str) -> str:
    """Return the source of an image, from its name; empty for a name of another form."""
    words = name.split("_")
    kind = words[2 if words[0] == SHARED else 1] if len(words) > 2 else ""
    return kind if words[0] in (SHARED, UNIQUE) and kind in KINDS else ""


class ImageTable:
    """The metadata table: image names and ids.

    Args:
        layout: Where the files lie.

    Raises:
        DataError: the table is missing or damaged, or says what its names do not.
    """

    def __init__(self, layout: LaionFmriLayout) -> None:
        self._layout, self._path = layout, layout.stimuli("metadata.csv")
        if not self._path.is_file():
            raise DataError(
                "LAION-fMRI's table of images is missing.", where=str(self._path), todo=f"check nsd_root; {FETCH}"
            )
        words = read_columns(self._path, ",", [], ["image_name", "unique_or_shared"])[1]
        self.names: tuple[str, ...] = tuple(words["image_name"])
        self.ids = {name: image_id for image_id, name in enumerate(self.names)}
        problems = (
            [f"{len(self.names) - len(self.ids)} names stand there twice"] if len(self.ids) < len(self.names) else []
        )
        for name, told in zip(self.names, words["unique_or_shared"], strict=True):
            if not kind_of(name) or not name.startswith(f"{told}_"):
                problems.append(f"{name!r}, unique_or_shared {told!r}")
        if problems:
            raise DataError(
                "The table of images is not as expected.",
                where=str(self._path),
                expected=f"each name once, begun as unique_or_shared says, then one of {', '.join(KINDS)}",
                found=f"{problems[0]}{f' and {len(problems) - 1} more' if len(problems) > 1 else ''}",
            )

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return sha256_file(self._path)

    @cached_property
    def is_shared(self) -> npt.NDArray[np.bool_]:
        """(num_images,) which images all subjects see."""
        return np.array([name.startswith(f"{SHARED}_") for name in self.names])

    def ids_of(self, names: Sequence[str], where: Path) -> npt.NDArray[np.int64]:
        """Return the ids of image names, in order.

        Raises:
            DataError: the table has no such name.
        """
        if unknown := [name for name in names if name not in self.ids]:
            raise DataError(
                "A table names an image that the table of images does not hold.",
                where=str(where),
                expected=f"a name of {self._path}",
                found=f"{unknown[0]!r}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
            )
        return np.array([self.ids[name] for name in names], dtype=np.int64)

    def seen_by(self, subject: int) -> npt.NDArray[np.bool_]:
        """(num_images,) which images are shared or a subject's own."""
        ending = f"_{PARTICIPANTS[subject]}"
        is_own = np.array([name.rpartition(".")[0].endswith(ending) for name in self.names])
        return np.asarray(self.is_shared | is_own)

    def captions(self) -> dict[int, tuple[str, ...]]:
        """Return image id -> what people wrote about it, best first; sentences of a language model are left out.

        Raises:
            DataError: the file is missing or damaged, or has captions of an unknown source.
        """
        path = self._layout.stimuli("desc-captions.csv")
        with reading(path, "The file of captions"):
            numbers, words = read_columns(path, ",", ["caption_idx"], ["image_name", "source", "caption"])
        if strange := sorted(set(words["source"]) - {"human", "ai"}):
            raise DataError(
                "Captions come from an unknown source.", where=str(path), expected="human, ai", found=strange
            )
        ids = self.ids_of(words["image_name"], path)
        found: dict[int, list[tuple[int, str]]] = {}
        rows = zip(ids.tolist(), numbers["caption_idx"].tolist(), words["source"], words["caption"], strict=True)
        for image_id, number, source, text in rows:
            if source == "human" and text.strip():
                found.setdefault(image_id, []).append((number, text.strip()))
        return {image_id: tuple(text for _, text in sorted(texts)) for image_id, texts in found.items()}

    def image_sets(self) -> ImageSets:
        """Return the splits and duplicates that lie in ``splits``, and the kinds of images as their names tell them.

        Raises:
            DataError: a file of a split contradicts itself or names an unknown image.
        """
        files = sorted(self._layout.splits.rglob("*.json"))
        doubles = [path for path in files if path.name.endswith("duplicate_groups.json")]
        splits: dict[str, dict[int, SplitImages]] = {}
        for path in (path for path in files if path.parent.parent == self._layout.splits):
            train, test = self._read_split(path)
            pool = path.parent.name
            of_pool = {subject_label(subject): [subject] for subject in PARTICIPANTS}.get(pool, list(PARTICIPANTS))
            name = path.stem if pool.startswith("sub-") else f"{pool}/{path.stem}"
            for subject in of_pool:
                is_seen = self.seen_by(subject)
                splits.setdefault(name, {})[subject] = SplitImages(train[is_seen[train]], test[is_seen[test]])
        hashes = {path.relative_to(self._layout.splits).as_posix(): sha256_file(path) for path in files}
        duplicates = [self.ids_of(names, path).tolist() for path in doubles for names in _sets_of(path)]
        return ImageSets(dict(sorted(splits.items())), self._groups(splits), duplicates, hashes)

    def _groups(self, splits: Mapping[str, Mapping[int, SplitImages]]) -> dict[str, list[int]]:
        """Return the kinds of images, the kinds of those out of distribution, and the clusters of all images."""
        groups: dict[str, list[int]] = {}
        for image_id, name in enumerate(self.names):
            kind = kind_of(name)
            groups.setdefault(kind, []).append(image_id)
            if kind == OOD:
                groups.setdefault(f"{OOD} {name.split('_')[3]}", []).append(image_id)
            else:
                groups.setdefault(f"not {OOD}", []).append(image_id)
        for name, of_subjects in splits.items():
            if name.startswith("pooled/cluster_"):
                tested = np.unique(np.concatenate([images.test for images in of_subjects.values()]))
                groups[f"cluster {name.rpartition('_')[2]}"] = tested.tolist()
        return dict(sorted(groups.items()))

    def _read_split(self, path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the training and test images of a split file; its label of the pool is an old one and not looked at.

        Raises:
            DataError: the file is of another form, or contradicts itself.
        """
        with reading(path, "The file of a split"):
            content: Any = read_json(path)  # Any: somebody else's JSON
            variants = content["variants"]
            parts = [[str(name) for name in variants[0][key]] for key in ("train_ids", "test_ids")]
            counts = [int(content[key]) for key in ("n_train", "n_test")]
        found = (str(content["name"]), len(variants), *map(len, parts))
        if found != (path.stem, 1, *counts):
            raise DataError(
                "The file of a split contradicts itself.",
                where=str(path),
                expected=f"name {path.stem}, 1 variant, {counts[0]} training and {counts[1]} test images",
                found="name {}, {} variants, {} training and {} test images".format(*found),
            )
        if both := sorted(set(parts[0]) & set(parts[1])):
            raise DataError(
                "A split trains on images that it tests.", where=str(path), found=f"{len(both)}, e.g. {both[0]}"
            )
        return self.ids_of(parts[0], path), self.ids_of(parts[1], path)


def _sets_of(path: Path) -> Iterator[Sequence[str]]:
    """Yield the sets of names in a file of duplicates: a list of sets, or such a list for every pool.

    Raises:
        DataError: the file is of another form.
    """
    with reading(path, "The file of images that show the same"):
        content: Any = read_json(path)  # Any: somebody else's JSON
        lists = list(content.values()) if isinstance(content, dict) else [content]
        sets = [names for found in lists for names in found]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in sets):
            raise ValueError("no sets of image names")
    yield from sets
