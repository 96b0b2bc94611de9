"""Puts the receipts of all shards together: tables, then ``index.json``. Pure but for the writing at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.config import Config, DataConfig
from nd_dist.files import write_bytes
from nd_dist.schema import TARGETS
from shards.format.codec import DTYPES, NPY_HEADER_BYTES, PICTURES, VOXELS, int8_store, member_field
from shards.format.index import (
    FORMAT,
    INDEX_NAME,
    TRIALS,
    VERSION,
    FeatureInfo,
    Index,
    ShardInfo,
    SubjectInfo,
    TableInfo,
    VoxelsInfo,
    index_id,
    json_bytes,
)
from shards.format.tables import IMAGE_ROW, Table, empty_image_table, table_bytes
from shards.packing.normalize import SCHEMES
from shards.packing.plan import PackPlan, TrialUnit
from shards.packing.quantize import INT8_DTYPE, find_scales
from shards.packing.receipts import Receipt
from shards.places.store import FolderStore
from shards.sources.contract import SubjectDesign


def assemble_index(
    config: Config, plan: PackPlan, receipts: Mapping[str, Receipt], source: Mapping[str, object]
) -> Index:
    """Write the tables and the index of a plan whose shards are all there, and return the index.

    Args:
        config: The recipe.
        plan: What was to be packed.
        receipts: Shard path -> receipt, of every shard of the plan.
        source: What identifies the data set.
    """
    shards: list[ShardInfo] = []
    trials: list[Table] = []
    for unit in plan.units:
        if isinstance(unit, TrialUnit):
            receipt = receipts[unit.path]
            rows = receipt.rows
            rows["shard"] = len(shards)
            trials.append(rows)
            shards.append(receipt.shard)
    tables: dict[str, Table] = {TRIALS: np.concatenate(trials)}
    features: dict[str, FeatureInfo] = {}
    scales = find_scales(config, plan, receipts)
    for store in (*TARGETS, *(int8_store(name) for name in TARGETS), PICTURES):
        used = [receipts[path] for unit in plan.image_units if (path := unit.path(store)) in receipts]
        if used:
            tables[store] = _image_table(plan.num_images, used, len(shards))
            features[store] = _feature(store, used, config.data, scales)
            shards += [receipt.shard for receipt in used]
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "num_images": plan.num_images,
        "voxels": VoxelsInfo(
            member=member_field(VOXELS), dtype=DTYPES[config.data.voxel_dtype], header=NPY_HEADER_BYTES
        ).model_dump(mode="json"),
        "subjects": {
            str(subject): _subject(design, config).model_dump(mode="json") for subject, design in plan.designs.items()
        },
        "features": {store: info.model_dump(mode="json") for store, info in features.items()},
        "tables": {name: _table(f"index/{name}.npy", table).model_dump(mode="json") for name, table in tables.items()},
        "shards": [shard.model_dump(mode="json") for shard in shards],
        "source": dict(source),
    }
    index = Index.parse(json_bytes({**content, "id": index_id(content)}), FolderStore(config.shards_folder))
    files = {index.tables[name].path: table_bytes(table) for name, table in tables.items()}
    files |= {_scale_path(int8_store(name)): table_bytes(scale) for name, scale in scales.items()}
    _write(index, files, config.shards_folder)
    return index


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
    """Write what is not there yet; an index that is about to change goes first, so it never lists other tables."""
    path = folder / INDEX_NAME
    content = index.json_bytes()
    is_same = path.is_file() and path.read_bytes() == content
    if not is_same:
        path.unlink(missing_ok=True)
    for name, table in files.items():
        table_path = folder / name
        if not table_path.is_file() or table_path.read_bytes() != table:
            write_bytes(table_path, table)
    if not is_same:
        write_bytes(path, content)


def _table(path: str, table: npt.NDArray[Any]) -> TableInfo:
    """Return what the index says of a table."""
    content = table_bytes(table)
    sha256 = hashlib.sha256(content).hexdigest()
    return TableInfo(path=path, rows=len(table), bytes=len(content), sha256=sha256)


def _scale_path(store: str) -> str:
    """Return the path of an int8 store's factors."""
    return f"index/{store}_scale.npy"


def _subject(design: SubjectDesign, config: Config) -> SubjectInfo:
    """Return what the index says of a subject."""
    name = config.data.normalization
    return SubjectInfo(
        voxels=design.num_voxels,
        sessions=len(design.sessions),
        trials=design.num_trials,
        test_trials=int(design.is_test.sum()),
        images=len(np.unique(design.image_id)),
        test_images=len(np.unique(design.image_id[design.is_test])),
        normalization=name,
        normalization_text=SCHEMES[name].text,
        source=dict(design.source),
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
