"""Puts the receipts of all shards together: tables, then ``index.json``. Pure but for the writing at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config, DataConfig
from nd_dist.errors import DataError
from nd_dist.files import write_bytes
from nd_dist.schema import TARGETS
from shards.format.codec import DTYPES, NPY_HEADER_BYTES, PICTURES, VOXELS, int8_store, member_field
from shards.format.index import (
    FORMAT,
    GROUPS,
    INDEX_NAME,
    RAW,
    SPLITS,
    TRIALS,
    VERSION,
    FeatureInfo,
    Index,
    SubjectInfo,
    TableInfo,
    VoxelsInfo,
    index_id,
    json_bytes,
)
from shards.format.splits import set_tables
from shards.format.tables import IMAGE_ROW, TEST, Table, empty_image_table, table_bytes
from shards.packing import doubts
from shards.packing.held import PREVIOUS_INDEX, last_index, number_of
from shards.packing.plan import SHARED_GROUP, PackPlan
from shards.packing.quantize import INT8_DTYPE, find_scales
from shards.packing.receipts import Receipt, receipt_path, remove_replaced
from shards.places.store import FolderStore
from shards.sources.contract import ImageSets, SubjectDesign

_NOT_SOURCE = ("normalization", "voxel_dtype", "format", "checksum", "sessions")  # of a trial shard's recipe


def assemble_index(
    config: Config,
    plan: PackPlan,
    receipts: Mapping[str, Receipt],
    source: Mapping[str, object],
    sets: ImageSets,
) -> Index:
    """Write the tables and the index of everything that a folder holds, and return the index.

    Args:
        config: The recipe.
        plan: What was to be packed.
        receipts: Shard path -> receipt, of every shard of the plan and of those that the folder keeps.
        source: What identifies the data set.
        sets: What it declares of its images.

    Raises:
        DataError: trials of different sessions or subjects are equal, or a set of images contradicts itself.
    """
    used = {receipt.shard.path: receipt for receipt in sorted(receipts.values(), key=_position)}
    for path in [path for path in used if path.replace("-test.tar", ".tar") != path]:
        if path.replace("-test.tar", ".tar") in used:  # the whole session was packed since
            del used[path]
    of_trials = [receipt for receipt in used.values() if receipt.shard.kind == TRIALS]
    accepted = {doubt for receipt in used.values() for doubt in receipt.accepted}
    accepted |= _settle_copies(config, of_trials, accepted)
    shards = [receipt.shard for receipt in of_trials]
    tables: dict[str, npt.NDArray[Any]] = {
        TRIALS: np.concatenate([_numbered(receipt, number) for number, receipt in enumerate(of_trials)]),
        RAW: np.concatenate([receipt.raw for receipt in of_trials]),
        **set_tables(sets, plan.num_images),
    }
    features: dict[str, FeatureInfo] = {}
    scales = find_scales(config, used)
    for store in (*TARGETS, *(int8_store(name) for name in TARGETS), PICTURES):
        of_store = [receipt for receipt in used.values() if receipt.shard.kind == store]
        if of_store:
            tables[store] = _image_table(plan.num_images, of_store, len(shards))
            features[store] = _feature(store, of_store, config.data, scales)
            shards += [receipt.shard for receipt in of_store]
    subjects = np.unique(tables[TRIALS]["subject"]).tolist()
    before = last_index(config.shards_folder)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "num_images": plan.num_images,
        "voxels": VoxelsInfo(
            member=member_field(VOXELS), dtype=DTYPES[config.data.voxel_dtype], header=NPY_HEADER_BYTES
        ).model_dump(mode="json"),
        "subjects": {
            str(subject): _subject(
                [receipt for receipt in of_trials if receipt.rows["subject"][0] == subject],
                plan.designs.get(subject),
                before.subjects.get(subject) if before is not None else None,
                source,
            ).model_dump(mode="json")
            for subject in subjects
        },
        "features": {store: info.model_dump(mode="json") for store, info in features.items()},
        "tables": {name: _table(f"index/{name}.npy", table).model_dump(mode="json") for name, table in tables.items()},
        "shards": [shard.model_dump(mode="json") for shard in shards],
        "source": {"simulated": False, **source, **({"image_sets": sets.source} if sets.source else {})},
        "accepted": sorted(accepted),
        **{name: list(names) for name, names in ((SPLITS, sets.splits), (GROUPS, sets.groups)) if name in tables},
    }
    index = Index.parse(json_bytes({**content, "id": index_id(content)}), FolderStore(config.shards_folder))
    files = {index.tables[name].path: table_bytes(table) for name, table in tables.items()}
    files |= {_scale_path(int8_store(name)): table_bytes(scale) for name, scale in scales.items()}
    _write(index, files, config.shards_folder)
    remove_replaced(config.shards_folder)
    return index.with_tables(tables)


def _position(receipt: Receipt) -> tuple[object, ...]:
    """Return where a shard stands in the index: by subject and session, or the shared images first."""
    group = receipt.shard.group
    return group != SHARED_GROUP, len(group), group, number_of(receipt.shard)


def _numbered(receipt: Receipt, number: int) -> Table:
    """Return a shard's rows with its position in the index."""
    rows = receipt.rows
    rows["shard"] = number
    return rows


def _settle_copies(config: Config, receipts: Sequence[Receipt], accepted: Collection[str]) -> set[str]:
    """Return the trials that equal one of another session or subject, where that was accepted.

    Raises:
        DataError: it was not; the sessions are packed again next time.
    """
    names = [
        doubts.trial_name(*map(int, row)) for r in receipts for row in r.rows[["subject", "session", "trial"]].tolist()
    ]
    raw, stored = (
        np.concatenate(parts) for parts in ([r.raw for r in receipts], [r.rows["checksum"] for r in receipts])
    )
    found = set(doubts.copy_doubts(raw, stored, names, accepted)) - set(accepted)
    try:
        doubts.settle(sorted(found), config.data.accept, "sessions and subjects against each other")
    except DataError:
        index, shards_dir = last_index(config.shards_folder), config.shards_folder
        listed = {shard.path for shard in index.shards} if index is not None else set()
        for receipt in receipts:  # what it was packed from will be downloaded again
            if receipt.shard.path not in listed:
                receipt_path(shards_dir, receipt.shard.path).unlink(missing_ok=True)
        raise
    return found


def _image_table(num_images: int, receipts: Sequence[Receipt], first_shard: int) -> Table:
    """Return the table of a store whose shards come one after the other in the index's list."""
    table = empty_image_table(num_images)
    for number, receipt in enumerate(receipts, start=first_shard):
        rows = receipt.rows
        for name in IMAGE_ROW.names or ():
            table[name][rows["image"]] = rows[name]
        table["shard"][rows["image"]] = number
    return table


def _write(index: Index, files: Mapping[str, bytes], folder: Path) -> None:
    """Write what is not there yet; an index that is about to change is put aside, so it never lists other tables."""
    path, previous = folder / INDEX_NAME, folder / PREVIOUS_INDEX
    content = index.json_bytes()
    is_same = path.is_file() and path.read_bytes() == content
    if not is_same and path.is_file():
        os.replace(path, previous)
    for name, table in files.items():
        table_path = folder / name
        if not table_path.is_file() or table_path.read_bytes() != table:
            write_bytes(table_path, table)
    if not is_same:
        write_bytes(path, content)
    previous.unlink(missing_ok=True)


def _table(path: str, table: npt.NDArray[Any]) -> TableInfo:
    """Return what the index says of a table."""
    content = table_bytes(table)
    sha256 = hashlib.sha256(content).hexdigest()
    return TableInfo(path=path, rows=len(table), bytes=len(content), sha256=sha256)


def _scale_path(store: str) -> str:
    """Return the path of an int8 store's factors."""
    return f"index/{store}_scale.npy"


def _subject(
    receipts: Sequence[Receipt],
    design: SubjectDesign | None,
    before: SubjectInfo | None,
    source: Mapping[str, object],
) -> SubjectInfo:
    """Return what the index says of a subject.

    Args:
        receipts: Of its trial shards.
        design: What it saw, where the recipe asks for it.
        before: What the index said of it.
        source: What identifies the data set.
    """
    rows = np.concatenate([receipt.rows for receipt in receipts])
    tests = rows[rows["split"] == TEST]
    name, _, text = receipts[0].recipe["normalization"].partition(": ")
    known = before.shown_test_images if before is not None else None
    own_name = before.name if before is not None else ""
    told = {key: value for key, value in receipts[0].recipe.items() if key not in (*source, *_NOT_SOURCE)}
    return SubjectInfo(
        name=own_name if design is None else design.name,
        voxels=receipts[0].shape[0],
        sessions=len(np.unique(rows["session"][rows["split"] != TEST])),
        trials=len(rows),
        test_trials=len(tests),
        images=len(np.unique(rows["image"])),
        test_images=len(np.unique(tests["image"])),
        shown_test_images=known if design is None else len(np.unique(design.image_id[design.is_test])),
        normalization=name,
        normalization_text=text,
        source=told if design is None else dict(design.source),
    )


def _feature(
    store: str, receipts: Sequence[Receipt], data: DataConfig, scales: Mapping[str, npt.NDArray[np.float32]]
) -> FeatureInfo:
    """Return what the index says of a store."""
    target = next((name for name in scales if int8_store(name) == store), None)
    dtype: str = DTYPES[data.target_dtype]
    source: dict[str, Any] = receipts[0].recipe.get("extractor", {})
    if store == PICTURES:
        dtype = "png"
    elif target is not None:
        dtype, source = INT8_DTYPE, {"target": target}
    return FeatureInfo(
        dtype=dtype,
        shape=receipts[0].shape,
        header=0 if store == PICTURES else NPY_HEADER_BYTES,
        rows=sum(receipt.shard.samples for receipt in receipts),
        source=source,
        scale=None if target is None else _table(_scale_path(store), scales[target]),
    )
