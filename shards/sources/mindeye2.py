"""MindEye2's published layout (``pscotti/mindeyev2``): z-scored betas in HDF5, one table of trials in small tars.

    betas_all_subj01_fp32_renorm.hdf5         ``betas`` (trials, voxels), z-scored by the publisher
    wds/subj01/train/0.tar ..                 behaviour of one session's trials whose images are not shared
    wds/subj01/new_test/0.tar                 behaviour of all trials with shared images
    coco_images_224_float16.hdf5              ``images`` (73000, 3, 224, 224), 0..1
    COCO_73k_annots_curated.npy               five captions a picture, some empty

The betas are z-scored once more by ``data.normalization``, which changes nothing but scale and mean. Nothing here
unpickles.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.files import read_json
from nd_dist.schema import SEMANTIC
from shards.sources.contract import SubjectDesign
from shards.sources.files import Deliveries, open_hdf5, reading

BEHAVIOUR = ".behav.npy"
# columns of behav.npy; image and trial are 0-based, session is 1-based
IMAGE, SUBJECT, SESSION, TRIAL, IS_SHARED = 0, 1, 2, 5, 16
NUM_COLUMNS = 17
MAX_MEMBER_BYTES = 1 << 20
PICTURES = "coco_images_224_float16.hdf5"
PIXEL_SLACK = 1e-2
EXPORT_RECORD = "nd_dist_export.json"  # in a folder that `nd export` wrote


class MindEye2Reader:
    """Reads MindEye2's layout; made by ``open``.

    Args:
        config: The recipe (``nsd_root`` and ``data``).
        num_images: Pictures in the picture file.
    """

    def __init__(self, config: Config, num_images: int) -> None:
        self._root, self._config = config.nsd_root, config.data
        self._designs: dict[int, SubjectDesign] = {}
        self._delivered = Deliveries(config.data.accept)
        self.num_images = num_images

    @classmethod
    def open(cls, config: Config) -> MindEye2Reader:
        """Return the reader after looking for pictures and captions.

        Raises:
            DataError: what is missing.
            ConfigError: a noise ceiling is asked for, which these files do not hold.
        """
        if config.data.min_noise_ceiling:
            raise ConfigError("MindEye2's files hold no noise ceilings.", where="data.min_noise_ceiling", expected=0)
        reader = cls(config, _shape(config.nsd_root / PICTURES, "images")[0])
        if SEMANTIC in config.data.targets:
            _ = reader._captions
        return reader

    @property
    def source(self) -> Mapping[str, object]:
        """Facts that identify the data set."""
        record = self._root / EXPORT_RECORD
        is_simulated = record.is_file() and bool(read_json(record).get("simulated"))
        return {"reader": "mindeye2", "num_images": self.num_images, "simulated": is_simulated}

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design, put together from the behaviour of the trials that were downloaded."""
        if subject not in self._designs:
            self._designs[subject] = self._read_design(subject)
        return self._designs[subject]

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return one session's betas (T, V) as published (z-scored)."""
        trials = self.design(subject).trials_of(session)
        with reading(path := self._betas_path(subject)), open_hdf5(path) as file:
            return np.asarray(file["betas"][trials[0] : trials[-1] + 1], dtype=np.float32)

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255, rounded from half precision."""
        with reading(path := self._root / PICTURES), open_hdf5(path) as file:
            pictures_NCHW = np.stack([file["images"][image_id] for image_id in image_ids]).astype(np.float32)
            for image_id, picture_CHW in zip(image_ids, pictures_NCHW, strict=True):
                if not (picture_CHW.min() >= -PIXEL_SLACK and picture_CHW.max() <= 1 + PIXEL_SLACK):  # or NaN
                    raise ValueError(
                        f"image {image_id} has pixels {picture_CHW.min()} .. {picture_CHW.max()}, not 0 .. 1"
                    )
        return np.clip(np.rint(pictures_NCHW.transpose(0, 2, 3, 1) * 255), 0, 255).astype(np.uint8)

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of pictures; blank ones are left out."""
        captions = [tuple(str(text) for text in self._captions[image_id] if text.strip()) for image_id in image_ids]
        if missing := [image_id for image_id, texts in zip(image_ids, captions, strict=True) if not texts]:
            raise DataError("A picture has no caption.", where=str(self._root), found=f"image {missing[0]}")
        return captions

    @cached_property
    def _captions(self) -> npt.NDArray[np.str_]:
        """Captions, (num_images, 5)."""
        path = self._root / "COCO_73k_annots_curated.npy"
        todo = "a file of Python objects: save it once as an array of text, or leave c out of data.targets"
        with reading(path, "The file of MindEye2's captions", todo if _is_pickled(path) else ""):
            captions = np.load(path, allow_pickle=False)
        if captions.ndim != 2 or len(captions) != self.num_images:
            raise DataError(
                "MindEye2's captions do not fit the pictures.",
                where=str(path),
                expected=f"({self.num_images}, 5)",
                found=captions.shape,
            )
        return np.asarray(captions)

    def _betas_path(self, subject: int) -> Path:
        """Return the published betas of a subject.

        Raises:
            DataError: they are missing, and what lies there instead.
        """
        path = self._root / f"betas_all_subj{subject:02d}_fp32_renorm.hdf5"
        others = sorted(found.name for found in self._root.glob(f"betas*subj{subject:02d}*.hdf5") if found != path)
        if not path.is_file() and others:
            raise DataError(
                f"The published betas of subject {subject} are missing.",
                where=str(path),
                found=f"{', '.join(others)}: a file of MindEye2's notebook has half precision and another z-scoring",
                todo="download the published file",
            )
        return path

    def _read_design(self, subject: int) -> SubjectDesign:
        """Put a subject's design together.

        Raises:
            DataError: see ``design``.
        """
        rows, present = self._read_rows(subject)
        num_rows, num_voxels = _shape(betas := self._betas_path(subject), "betas")
        trial, last = rows[:, TRIAL], int(rows[:, SESSION].max())
        required = min(self._config.max_sessions or last, last)
        folder = self._root / f"wds/subj{subject:02d}"
        if missing := [session for session in range(1, required + 1) if session not in present]:
            raise DataError(
                f"The trials of subject {subject} are not complete: no training trials of session {missing[0]}.",
                where=str(folder / "train"),
                expected=", ".join(f"{session - 1}.tar" for session in missing[:5]),
                found=f"{len(present)} tars of sessions {_ranges(present)}",
                todo="download them" + (f", or set data.max_sessions={missing[0] - 1}" if missing[0] > 1 else ""),
            )
        session = _sessions(rows, present)
        complete = np.isin(session, present)
        problem = ""
        if len(np.unique(trial)) < len(trial):
            problem = f"trial {_first_repeated(trial)} twice"
        elif (session[trial] != rows[:, SESSION]).any():
            wrong = rows[np.flatnonzero(session[trial] != rows[:, SESSION])[0]]
            problem = f"trial {wrong[TRIAL]} in session {wrong[SESSION]} instead of {session[wrong[TRIAL]]}"
        elif len(absent := np.setdiff1d(np.flatnonzero(complete), trial)):
            problem = f"{len(trial)} trials, trial {absent[0]} is missing"
        elif int(np.count_nonzero(session <= required)) > num_rows:
            problem = f"betas of {num_rows} trials"
        if problem:
            raise DataError(
                f"The trials of subject {subject} are not complete, or contradict each other.",
                where=str(folder),
                expected=f"trials 0 .. {num_rows - 1}, each once and in order",
                found=problem,
                todo="download all train tars and new_test, or set data.max_sessions",
            )
        with reading(betas), open_hdf5(betas) as file:
            self._delivered.refuse_copy(betas, np.asarray(file["betas"][:1]).tobytes())
        image_id, is_test = np.full(len(session), -1), np.zeros(len(session), dtype=np.bool_)
        image_id[trial], is_test[trial] = rows[:, IMAGE], rows[:, IS_SHARED] == 1
        return SubjectDesign(
            subject=subject,
            num_voxels=num_voxels,
            session=session,
            image_id=image_id,
            is_test=is_test,
            source={"betas": betas.name, "roi": "nsdgeneral, z-scored as published"},
            absent=tuple(np.unique(session[num_rows:]).tolist()),
        )

    def _read_rows(self, subject: int) -> tuple[npt.NDArray[np.int64], list[int]]:
        """Return the behaviour (T, 17) of all trials in a subject's tars, and the sessions of its training tars.

        Raises:
            DataError: a tar is missing, damaged, has another name, or holds what belongs elsewhere.
        """
        folder = self._root / f"wds/subj{subject:02d}"
        trains = sorted((folder / "train").glob("*.tar"))
        if strange := [path for path in trains if not re.fullmatch(r"0|[1-9]\d*", path.stem)]:
            raise DataError(
                "This is not the name of a session's trials.",
                where=str(strange[0]),
                expected="0.tar, 1.tar ..., one a session",
                todo="remove it (was the same file downloaded twice?) or rename it correctly",
            )
        shared_path = self._root / "shared1000.npy"
        shared: npt.NDArray[np.bool_] | None = None
        if shared_path.exists():
            with reading(shared_path):
                shared = np.load(shared_path, allow_pickle=False).astype(np.bool_)
        rows = []
        for path in (*trains, folder / "new_test/0.tar"):
            is_train = path.parent.name == "train"
            for row in _read_behaviour(path):
                expected = {"subject": subject, "shared": int(not is_train)}
                found = {"subject": int(row[SUBJECT]), "shared": int(row[IS_SHARED])}
                if is_train:
                    expected["session"], found["session"] = int(path.stem) + 1, int(row[SESSION])
                if not 0 <= (image_id := int(row[IMAGE])) < self.num_images:
                    expected["image"], found["image"] = self.num_images - 1, image_id
                elif shared is not None and image_id < len(shared) and bool(shared[image_id]) == is_train:
                    found["shared"] = int(shared[image_id])
                if expected != found or row[SESSION] < 1 or row[TRIAL] < 0:
                    raise DataError(
                        f"A trial says something else than where it lies (trial {int(row[TRIAL])}).",
                        where=str(path),
                        expected=", ".join(f"{name} {value}" for name, value in expected.items()),
                        found=", ".join(f"{name} {value}" for name, value in found.items()),
                        todo="download the file again",
                    )
                rows.append(row)
        found_rows = np.array(rows, dtype=np.int64).reshape(-1, NUM_COLUMNS)
        return found_rows[np.argsort(found_rows[:, TRIAL], kind="stable")], sorted(int(p.stem) + 1 for p in trains)


def _sessions(rows: npt.NDArray[np.int64], present: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the session (T,) of every trial up to the last one, known or not.

    Where training trials were not downloaded, sessions are taken to be as long as the first (750 trials in NSD).
    """
    trial, session = rows[:, TRIAL], rows[:, SESSION]
    num_trials, length = int(trial.max()) + 1, int(np.count_nonzero(session == 1))
    if set(range(1, int(session.max()) + 1)) <= set(present):
        sessions = np.zeros(num_trials, dtype=np.int64)
        sessions[trial] = session
        return np.maximum.accumulate(sessions)
    return 1 + np.arange(-(-num_trials // length) * length) // length


def _first_repeated(values: npt.NDArray[np.int64]) -> int:
    """Return the first value that is there more than once."""
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts > 1][0])


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers for people: ``1..3, 5``."""
    runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1) if numbers else []
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) or "none"


def _is_pickled(path: Path) -> bool:
    """Return whether an npy file says that it holds Python objects."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return b"'descr': '|O'" in stream.read(256)


def _read_behaviour(path: Path) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the behaviour of every trial in a tar, (17,).

    Raises:
        DataError: the tar is missing, damaged, or holds another layout.
    """
    with reading(path, "A file of trials"), tarfile.open(path, "r:") as tar:
        for member in tar:
            _check_member(member)
            if not member.name.endswith(BEHAVIOUR):
                continue
            stream = tar.extractfile(member)
            assert stream is not None, "regular members have content"
            values = np.load(io.BytesIO(stream.read()), allow_pickle=False).reshape(-1)
            if len(values) != NUM_COLUMNS:
                raise ValueError(f"{member.name} has {len(values)} columns instead of {NUM_COLUMNS}")
            yield np.where(np.isfinite(values), values, -1)


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuse a member that has no business in a tar of behaviour.

    Raises:
        ValueError: a link or device, a name that leads elsewhere, anything but npy, or a size or header beyond reason.
    """
    parts = PurePosixPath(member.name).parts
    is_named_well = member.name.endswith(".npy") and ".." not in parts and not member.name.startswith("/")
    num_bytes = member.size + sum(len(value) for value in member.pax_headers.values())
    if not member.isreg() or not is_named_well or num_bytes > MAX_MEMBER_BYTES:
        raise ValueError(f"member {member.name[:60]!r} is not a small plain npy file")


def _shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a data set of an HDF5 file.

    Raises:
        DataError: the file or the data set is missing or damaged.
    """
    with reading(path), open_hdf5(path) as file:
        return tuple(int(size) for size in file[name].shape)
