"""Finds what is broken in a folder of shards and sets it aside, so that ``nd pack`` packs just that again.

Nothing is deleted: a damaged file is renamed (``.damaged``), and goes only when its shard has been packed again and
the index is written.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from nd_dist.errors import DataError
from nd_dist.files import read_json, sha256_file
from shards.format.index import INDEX_NAME
from shards.packing.held import last_index
from shards.packing.receipts import DAMAGED_SUFFIX, RECEIPTS_DIR, Receipt, is_whole
from shards.upkeep.verify import verify


def find_damage(shards_dir: Path) -> list[str]:
    """Return the paths below a folder of what is wrong: shards, tables, receipts, the index. Changes nothing.

    Args:
        shards_dir: Folder that ``nd pack`` wrote, or began to write; without a sound index receipts judge.
    """
    damaged = {problem.shard for problem in verify(shards_dir)}
    index = last_index(shards_dir) if INDEX_NAME not in damaged else None
    judged = {shard.path for shard in index.shards} if index is not None else set()
    for path in sorted((shards_dir / RECEIPTS_DIR).glob("*.tar.json")):
        try:
            shard = Receipt.model_validate(read_json(path)).shard
        except (DataError, ValidationError):
            damaged.add(str(path.relative_to(shards_dir)))
            continue
        is_there = shard.path not in judged and is_whole(shards_dir, shard)
        if is_there and sha256_file(shards_dir / shard.path) != shard.sha256:
            damaged.add(shard.path)
    return sorted(damaged)


def repair(shards_dir: Path) -> list[str]:
    """Set damaged shards and receipts aside and return what is wrong; ``nd pack`` makes all of it again.

    Index and tables stay, they are written again where they differ from what is packed. Have at hand what the shards
    were packed from, and ``restore`` what could not be packed.

    Args:
        shards_dir: See ``find_damage``.
    """
    damaged = find_damage(shards_dir)
    for name in damaged:
        path = shards_dir / name
        if (path.suffix == ".tar" or path.parent.name == RECEIPTS_DIR) and path.is_file():
            os.replace(path, path.with_name(path.name + DAMAGED_SUFFIX))
    return damaged


def restore(shards_dir: Path) -> None:
    """Give files that were set aside their names back where nothing has taken their place."""
    for path in shards_dir.rglob(f"*{DAMAGED_SUFFIX}"):
        if not (place := path.with_suffix("")).exists():
            os.replace(path, place)
