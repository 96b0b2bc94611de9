"""``index.json``: what a folder of shards holds. Written last, so its presence means that everything is there.

Layout of a folder (format 1; see also ``shards.format.tables``, ``shards.format.codec``)::

    index.json                              this file
    index/trials.npy                        one row a trial
    index/raw.npy                           one number a trial: the checksum of its betas before z-scoring
    index/<store>.npy                       one row an image id
    index/splits.npy, groups.npy, duplicates.npy   sets of images, where the data set declares some
    trials/subj01/nsd-s01-e01.tar           one shard a subject and session
    features/<store>/nsd-<store>-<group>-000.tar   images grouped by who sees them: shared, s01 .. s08
    .pack/                                  receipts of finished shards, for resuming and repairing

Paths are relative, and nothing depends on time, host or number of ranks: equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from nd_dist.config import RemoteConfig
from nd_dist.errors import DataError
from nd_dist.files import hash_json
from nd_dist.schema import TARGETS, TargetSpec, role_of
from shards.format.codec import PICTURES
from shards.format.tables import IMAGE_ROW, MEMBER_ROW, SPLIT_ROW, TEST, TRIAL_ROW, Table, read_table
from shards.places.open import open_store
from shards.places.store import FolderStore, Store, StoredFile

FORMAT: Literal["nsd-shards"] = "nsd-shards"
VERSION: Literal[1] = 1
INDEX_NAME = "index.json"
TRIALS = "trials"
RAW = "raw"
MAX_NAMED = 4  # wrong fields in a message
SPLITS, GROUPS, DUPLICATES = "splits", "groups", "duplicates"
_ROWS: dict[str, np.dtype[Any]] = {  # of all tables but those of stores
    **{TRIALS: TRIAL_ROW, RAW: np.dtype("<u8")},
    **{SPLITS: SPLIT_ROW, GROUPS: MEMBER_ROW, DUPLICATES: MEMBER_ROW},
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    _not_if_empty: ClassVar[tuple[str, ...]] = ()
    """Fields that came later: they are written where they say something, so that other folders keep their bytes."""

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:  # Any: JSON
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if value or name not in self._not_if_empty}


class VoxelsInfo(_Record):
    """How voxels are stored."""

    member: str
    """Field of the members."""
    dtype: Literal["<f2", "<f4"]
    """Stored dtype."""
    header: int
    """Bytes of the npy header before the record."""


class SubjectInfo(_Record):
    """One subject's trials."""

    _not_if_empty: ClassVar[tuple[str, ...]] = ("name",)
    name: str = ""
    """The data set's own name of the subject; empty: its number says it."""
    voxels: int
    """Voxels of the ROI."""
    sessions: int
    """Sessions whose training trials are packed, 1 .. sessions."""
    trials: int
    """Trials packed."""
    test_trials: int
    """Of them with a test image."""
    images: int
    """Different images seen."""
    test_images: int
    """Of them test images."""
    shown_test_images: int | None = None
    """Test images that the subject saw; fewer are packed where the test set was restricted, or betas are missing."""
    normalization: str
    """Name of the z-scoring (``data.normalization``)."""
    normalization_text: str
    """What that is."""
    source: dict[str, Any]
    """What identifies the data: betas, ROI and its hash."""


class TableInfo(StoredFile):
    """One binary table."""

    rows: int


class FeatureInfo(_Record):
    """One image-keyed store: a target, or the pictures."""

    dtype: str
    """Stored dtype; ``png`` for pictures."""
    shape: tuple[int, ...]
    """Shape of one image's record; of one picture (H, W, 3)."""
    header: int
    """Bytes of the npy header before the record; 0 for pictures."""
    rows: int
    """Images in the store."""
    source: dict[str, Any]
    """What the records were made by."""
    scale: TableInfo | None = None
    """int8 stores: factors (float32, broadcast over a record) that turn the stored bytes into values."""


class ShardInfo(StoredFile):
    """One tar."""

    kind: str
    """``trials`` or the store's name."""
    group: str
    """``s01`` .. or ``shared``."""
    samples: int
    invalid_voxels: int = 0
    """Trial shards: voxels that were constant or not finite in this session and are zero."""


class Index(_Record):
    """The content of ``index.json``."""

    _not_if_empty: ClassVar[tuple[str, ...]] = (SPLITS, GROUPS)

    format: Literal["nsd-shards"]
    version: Literal[1]
    id: str
    """sha256 of everything else in this file."""
    num_images: int
    """Image ids of the data set are 0 .. num_images - 1."""
    voxels: VoxelsInfo
    subjects: dict[int, SubjectInfo]
    features: dict[str, FeatureInfo]
    tables: dict[str, TableInfo]
    shards: tuple[ShardInfo, ...]
    source: dict[str, Any]
    """What identifies the data set; ``simulated``: whether it is made up (not stated by earlier versions)."""
    accepted: tuple[str, ...] = ()
    """What cannot be real data and was packed knowingly (``data.accept``): kind and sample."""
    splits: tuple[str, ...] = ()
    """Named splits that the data set declares, beside its own."""
    groups: tuple[str, ...] = ()
    """Kinds of images that the data set declares, to be reported apart."""
    _store: Store = PrivateAttr(default_factory=lambda: FolderStore(Path()))
    _loaded: dict[str, Table] = PrivateAttr(default_factory=dict)
    _scales: dict[str, npt.NDArray[np.float32]] = PrivateAttr(default_factory=dict)

    @property
    def store(self) -> Store:
        """Where the shards lie; not part of the file."""
        return self._store

    @property
    def place(self) -> str:
        """Folder or URL of the shards, for messages."""
        return self._store.place

    @property
    def target_specs(self) -> tuple[TargetSpec, ...]:
        """The targets that are packed, in the order of ``schema.TARGETS``."""
        return tuple(
            TargetSpec(name, role_of(name), self.features[name].shape) for name in TARGETS if name in self.features
        )

    @property
    def num_voxels(self) -> dict[int, int]:
        """Subject -> voxels of its ROI."""
        return {subject: info.voxels for subject, info in self.subjects.items()}

    @property
    def trials(self) -> Table:
        """The table of trials (``tables.TRIAL_ROW``), read once."""
        return self.table(TRIALS)

    @property
    def is_simulated(self) -> bool | None:
        """Whether the data set is made up, as its reader stated; None where an earlier version packed it."""
        return self.source.get("simulated")

    @property
    def raw_checksums(self) -> npt.NDArray[np.uint64]:
        """(trials,) the checksum of every trial's betas before z-scoring; 0 where an earlier version packed it."""
        if RAW not in self.tables:
            return np.zeros(len(self.trials), dtype=np.uint64)
        return self.table(RAW)  # type: ignore[return-value]

    def table(self, kind: str) -> Table:
        """Return the table of a store (``tables.IMAGE_ROW``, one row an image id), or any other; read once.

        Raises:
            DataError: the store was not packed, or the table is damaged.
        """
        if kind not in self._loaded:
            if kind not in _ROWS:
                self.feature(kind)
            info = self.tables[kind]
            self._loaded[kind] = read_table(self._store, info, info.rows, _ROWS.get(kind, IMAGE_ROW))
        return self._loaded[kind]

    def scale(self, store: str) -> npt.NDArray[np.float32]:
        """Return the factors of an int8 store, of a shape that broadcasts over a record; read once.

        Raises:
            DataError: the file is damaged.
        """
        info = self.feature(store).scale
        assert info is not None, "only int8 stores have factors"
        if store not in self._scales:
            self._scales[store] = read_table(self._store, info, info.rows, np.dtype(np.float32))
        return self._scales[store]

    def feature(self, store: str) -> FeatureInfo:
        """Return what is known of a store.

        Raises:
            DataError: the store was not packed.
        """
        if store not in self.features:
            wish = "data.pictures" if store == PICTURES else "data.targets"
            raise DataError(
                f"The shards hold no store {store!r}.",
                where=self.place,
                expected=sorted(self.features),
                todo=f"add it to {wish} and run `nd pack` again; trials are not repacked",
            )
        return self.features[store]

    def content_id(self, subjects: Sequence[int], stores: Sequence[str], sessions: Sequence[int] | None = None) -> str:
        """Return a hash of what a training reads: its trials in order, their images, and every record's checksum.

        It stays the same whatever else is packed into the folder, and however records are dealt out to shards.

        Args:
            subjects: Subjects that are read.
            stores: Stores that are read.
            sessions: Sessions of which training trials are read (none: all); of test trials all are.

        Raises:
            DataError: a store was not packed, or a table is damaged.
        """
        is_read = np.isin(self.trials["subject"], list(subjects))
        if sessions is not None:
            is_read &= np.isin(self.trials["session"], list(sessions)) | (self.trials["split"] == TEST)
        return self.rows_id(self.trials[is_read], stores)

    def identity(
        self, subjects: Sequence[int], stores: Sequence[str], sessions: Sequence[int] | None = None
    ) -> dict[str, object]:
        """Return ``content_id`` as ``data.content`` and the hash of all that is packed as ``data.index``."""
        return {"data.content": self.content_id(subjects, stores, sessions), "data.index": self.id}

    def rows_id(self, rows: Table, stores: Sequence[str]) -> str:
        """Return a hash of some rows of ``trials`` in order, of their images, and of every record's checksum.

        Raises:
            DataError: a store was not packed, or a table is damaged.
        """
        images = np.unique(rows["image"])
        digest = hashlib.sha256()
        for name in ("subject", "session", "repeat", "split", "trial", "image", "checksum"):
            digest.update(np.ascontiguousarray(rows[name]).tobytes())
        for store in sorted(stores):
            scale = self.feature(store).scale
            digest.update(f"{store} {scale.sha256 if scale else ''}".encode())
            digest.update(np.ascontiguousarray(self.table(store)["checksum"][images]).tobytes())
        return digest.hexdigest()

    @staticmethod
    def exists(folder: Path) -> bool:
        """Return whether a folder holds a complete set of shards."""
        return (folder / INDEX_NAME).is_file()

    @staticmethod
    def read(location: Path | str, remote: RemoteConfig | None = None) -> Index:
        """Return the index of a folder of shards, or of a URL, without reading its tables.

        Raises:
            DataError: there is none, it is damaged, or it is of an unknown version.
            ConfigError: the URL's protocol needs a package that is not installed.
        """
        store = open_store(location, remote)
        if isinstance(store, FolderStore) and not Index.exists(store.folder):
            where = str(store.folder / INDEX_NAME)
            raise DataError("These shards have no index.", where=where, todo="run `nd pack` (again: it resumes)")
        return Index.parse(store.read_whole(INDEX_NAME), store)

    @staticmethod
    def parse(text: bytes, store: Store) -> Index:
        """Return the index in ``text`` of the shards in a store.

        Raises:
            DataError: it is damaged, or of an unknown version.
        """
        where = f"{store.place}/{INDEX_NAME}"
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError("A file is not valid JSON.", where=where, found=str(error)) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise DataError("This is not the index of packed shards.", where=where, expected=FORMAT, found=found)
        if (version := content.get("version")) != VERSION:
            is_newer = isinstance(version, int) and version > VERSION
            raise DataError(
                "These shards are of another version of the format.",
                where=where,
                expected=f"version {VERSION}",
                found=f"version {version}",
                todo="update nd_dist" if is_newer else "pack into a new folder",
            )
        if content.get("id") != index_id(content):
            raise DataError("The index is damaged: its hash differs.", where=where, todo="run `nd pack` again")
        try:
            index = Index(**content)
        except ValidationError as error:
            raise DataError(
                "The index has other fields than this version of nd_dist writes.",
                where=where,
                expected=f"the fields of {FORMAT}, version {VERSION}",
                found=differing_fields(error),
                todo="use the nd_dist that packed these shards, or pack into a new folder with this one",
            ) from error
        index._store = store
        return index

    def with_tables(self, tables: Mapping[str, npt.NDArray[Any]]) -> Index:
        """Return this index with some of its tables, which are then not read."""
        index = self.model_copy()
        index._loaded = {**self._loaded, **tables}
        return index

    def json_bytes(self) -> bytes:
        """Return the content of ``index.json``."""
        return json_bytes(self.model_dump(mode="json"))


def differing_fields(error: ValidationError) -> str:
    """Return the first fields that do not fit, in words of ours."""
    words = {"missing": "is missing", "extra_forbidden": "is unknown"}
    details = error.errors(include_url=False)
    named = [f"{'.'.join(map(str, detail['loc']))} {words.get(detail['type'], 'is wrong')}" for detail in details]
    return ", ".join(named[:MAX_NAMED]) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")


def index_id(content: Mapping[str, Any]) -> str:
    """Return the id of an index's JSON: the hash of everything but the id."""
    return hash_json({key: value for key, value in content.items() if key != "id"})


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return an index's JSON as the bytes of its file."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
