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
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import h5py
import numpy as np
import numpy.typing as npt

from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.files import hash_json
from nd_dist.schema import SEMANTIC
from shards.sources.contract import SubjectDesign

BEHAVIOUR = ".behav.npy"
# columns of behav.npy; image and trial are 0-based, session is 1-based
IMAGE, SUBJECT, SESSION, TRIAL, IS_SHARED = 0, 1, 2, 5, 16
NUM_COLUMNS = 17
MAX_MEMBER_BYTES = 1 << 20


class MindEye2Reader:
    """Reads MindEye2's layout; made by ``open``.

    Args:
        config: The recipe (``nsd_root`` and ``data``).
        num_images: Pictures in the picture file.
    """

    def __init__(self, config: Config, num_images: int) -> None:
        self._root, self._config = config.nsd_root, config.data
        self._rows: dict[int, npt.NDArray[np.int64]] = {}
        self.num_images = num_images

    @classmethod
    def open(cls, config: Config) -> MindEye2Reader:
        """Return the reader after looking for pictures and captions.

        Raises:
            DataError: what is missing.
        """
        path = config.nsd_root / "coco_images_224_float16.hdf5"
        reader = cls(config, _hdf5_shape(path, "images")[0])
        if SEMANTIC in config.data.targets:
            _ = reader._captions
        return reader

    @property
    def source(self) -> Mapping[str, object]:
        """Facts that identify the data set."""
        return {"reader": "mindeye2", "num_images": self.num_images}

    def design(self, subject: int) -> SubjectDesign:
        """Return a subject's design, put together from the behaviour of all its trials.

        Raises:
            DataError: a file is missing, or trials are missing or do not fit the betas.
        """
        behaviour = self._behaviour(subject)
        trials = behaviour[:, TRIAL]
        num_trials, num_voxels = _hdf5_shape(self._betas_path(subject), "betas")
        if (trials != np.arange(len(trials))).any() or len(trials) > num_trials:
            missing = np.setdiff1d(np.arange(trials.max() + 1), trials)
            raise DataError(
                f"The trials of subject {subject} are not complete.",
                where=str(self._root / f"wds/subj{subject:02d}"),
                expected=f"trials 0 .. {num_trials - 1}, each once",
                found=f"{len(trials)} trials" + (f", trial {missing[0]} is missing" if len(missing) else ""),
                todo="download all train tars and new_test, or set data.max_sessions",
            )
        image_id = behaviour[:, IMAGE]
        if int(image_id.min()) < 0 or int(image_id.max()) >= self.num_images:
            raise DataError(
                "A trial names a picture that does not exist.",
                where=str(self._root / f"wds/subj{subject:02d}"),
                expected=f"0 .. {self.num_images - 1}",
                found=int(image_id.max()),
            )
        return SubjectDesign(
            subject=subject,
            num_voxels=num_voxels,
            session=behaviour[:, SESSION],
            image_id=image_id,
            is_test=behaviour[:, IS_SHARED] == 1,
            source={
                "betas": self._betas_path(subject).name,
                "roi": "nsdgeneral, z-scored as published",
                "trials": hash_json(behaviour[:, [IMAGE, SESSION, IS_SHARED]].tolist()),
            },
        )

    def read_session(self, subject: int, session: int) -> npt.NDArray[np.float32]:
        """Return one session's betas (T, V) as published (z-scored).

        Raises:
            DataError: the file is damaged.
        """
        trials = np.flatnonzero(self._behaviour(subject)[:, SESSION] == session)
        path = self._betas_path(subject)
        try:
            with h5py.File(path, "r") as file:
                return np.asarray(file["betas"][trials[0] : trials[-1] + 1], dtype=np.float32)
        except (OSError, KeyError) as error:
            raise DataError("Betas cannot be read.", where=str(path), found=str(error)) from error

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures (N, H, W, 3), 0..255, rounded from half precision.

        Raises:
            DataError: the file is damaged.
        """
        path = self._root / "coco_images_224_float16.hdf5"
        try:
            with h5py.File(path, "r") as file:
                pictures_NCHW = np.stack([file["images"][image_id] for image_id in image_ids])
        except (OSError, KeyError, ValueError) as error:
            raise DataError("Pictures cannot be read.", where=str(path), found=str(error)) from error
        pixels_NHWC = pictures_NCHW.astype(np.float32).transpose(0, 2, 3, 1)
        return np.clip(np.rint(pixels_NHWC * 255), 0, 255).astype(np.uint8)

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the captions of pictures; empty ones are left out.

        Raises:
            DataError: a picture has no caption.
        """
        captions = [tuple(str(text) for text in self._captions[image_id] if str(text)) for image_id in image_ids]
        if missing := [image_id for image_id, texts in zip(image_ids, captions, strict=True) if not texts]:
            raise DataError("A picture has no caption.", where=str(self._root), found=f"image {missing[0]}")
        return captions

    @cached_property
    def _captions(self) -> npt.NDArray[np.str_]:
        """Captions, (num_images, 5)."""
        path = self._root / "COCO_73k_annots_curated.npy"
        try:
            captions = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                "MindEye2's captions cannot be read (a file of Python objects is refused).",
                where=str(path),
                found=str(error),
                todo="save it once as an array of text, or leave c out of data.targets",
            ) from error
        if captions.ndim != 2 or len(captions) != self.num_images:
            raise DataError(
                "MindEye2's captions do not fit the pictures.",
                where=str(path),
                expected=f"({self.num_images}, 5)",
                found=captions.shape,
            )
        return np.asarray(captions)

    def _betas_path(self, subject: int) -> Path:
        return self._root / f"betas_all_subj{subject:02d}_fp32_renorm.hdf5"

    def _behaviour(self, subject: int) -> npt.NDArray[np.int64]:
        """Return the behaviour of all trials of the wanted sessions in order, (T, 17); missing entries are -1."""
        if subject not in self._rows:
            self._rows[subject] = self._read_subject(subject)
        return self._rows[subject]

    def _read_subject(self, subject: int) -> npt.NDArray[np.int64]:
        """Read the behaviour of a subject's trials from its tars.

        Raises:
            DataError: a tar is missing or damaged, or a session has no training trials.
        """
        folder = self._root / f"wds/subj{subject:02d}"
        tars = [*sorted((folder / "train").glob("*.tar")), folder / "new_test/0.tar"]
        rows = np.array([row for path in tars for row in _read_behaviour(path)], dtype=np.int64)
        last_session = int(rows[:, SESSION].max())
        train_sessions = range(1, len(tars))
        if last_session > len(train_sessions) and self._config.max_sessions is None:
            raise DataError(
                f"Subject {subject} has test trials of session {last_session}, but no training trials of it.",
                where=str(folder / "train"),
                expected=f"{last_session - 1}.tar",
                todo=f"download it, or set data.max_sessions={len(train_sessions)}",
            )
        rows = rows[rows[:, SESSION] <= (self._config.max_sessions or last_session)]
        return np.asarray(rows[np.argsort(rows[:, TRIAL], kind="stable")])


def _read_behaviour(path: Path) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the behaviour of every trial in a tar, (17,).

    Raises:
        DataError: the tar is missing, damaged, or holds another layout.
    """
    try:
        with tarfile.open(path, "r:") as tar:
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
    except FileNotFoundError as error:
        raise DataError("A file of trials is missing.", where=str(path), todo="download it") from error
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise DataError("A file of trials cannot be read.", where=str(path), found=str(error)) from error


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


def _hdf5_shape(path: Path, name: str) -> tuple[int, ...]:
    """Return the shape of a dataset.

    Raises:
        DataError: the file or dataset is missing or damaged.
    """
    if not path.is_file():
        raise DataError("A file of MindEye2's data set is missing.", where=str(path), todo="download it")
    try:
        with h5py.File(path, "r") as file:
            return tuple(int(size) for size in file[name].shape)
    except (OSError, KeyError) as error:
        raise DataError("A file of MindEye2's data set cannot be read.", where=str(path), found=str(error)) from error
