"""Puts the receipts of all shards together: tables, then ``index.json``. Pure but for the writing at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nd_dist.config import Config
from nd_dist.files import sha256_file, write_bytes
from nd_dist.schema import TARGETS
from shards.codec import DTYPES, NPY_HEADER_BYTES, PICTURES, VOXELS, member_field
from shards.contract import SubjectDesign
from shards.index import (
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
)
from shards.normalize import SCHEMES
from shards.plan import TARGET_DTYPE, PackPlan, TrialUnit
from shards.receipts import Receipt
from shards.tables import IMAGE_ROW, Table, empty_image_table, table_bytes


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
    for store in (*TARGETS, PICTURES):
        table, used = empty_image_table(plan.num_images), []
        for unit in plan.units:
            if not isinstance(unit, TrialUnit) and store in unit.stores:
                receipt = receipts[unit.path(store)]
                rows = receipt.rows
                for name in IMAGE_ROW.names or ():
                    table[name][rows["image"]] = rows[name]
                table["shard"][rows["image"]] = len(shards)
                shards.append(receipt.shard)
                used.append(receipt)
        if used:
            tables[store] = table
            features[store] = _feature(store, used)
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
        "tables": {name: _table(name, table).model_dump(mode="json") for name, table in tables.items()},
        "shards": [shard.model_dump(mode="json") for shard in shards],
        "source": dict(source),
    }
    index = Index(**content, id=index_id(content), folder=config.shards_dir)
    _write(index, tables)
    return index


def _write(index: Index, tables: Mapping[str, Table]) -> None:
    """Write what is not there yet; an index that is about to change goes first, so it never lists other tables."""
    path = index.folder / INDEX_NAME
    content = index.json_bytes()
    is_same = path.is_file() and path.read_bytes() == content
    if not is_same:
        path.unlink(missing_ok=True)
    for name, table in tables.items():
        table_path = index.folder / index.tables[name].path
        if not table_path.is_file() or sha256_file(table_path) != index.tables[name].sha256:
            write_bytes(table_path, table_bytes(table))
    if not is_same:
        write_bytes(path, content)


def _table(name: str, table: Table) -> TableInfo:
    """Return what the index says of a table."""
    sha256 = hashlib.sha256(table_bytes(table)).hexdigest()
    return TableInfo(path=f"index/{name}.npy", rows=len(table), sha256=sha256)


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


def _feature(store: str, receipts: list[Receipt]) -> FeatureInfo:
    """Return what the index says of a store."""
    is_picture = store == PICTURES
    recipe = receipts[0].recipe
    return FeatureInfo(
        dtype="png" if is_picture else TARGET_DTYPE,
        shape=receipts[0].shape,
        header=0 if is_picture else NPY_HEADER_BYTES,
        rows=sum(receipt.shard.samples for receipt in receipts),
        source={} if is_picture else dict(recipe["extractor"]),
    )
