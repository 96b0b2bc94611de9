"""Removes what is broken in a folder of shards, so that ``nd pack`` with the same recipe packs just that again."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from nd_dist.errors import DataError
from nd_dist.files import read_json, sha256_file
from shards.format.index import INDEX_NAME
from shards.packing.receipts import RECEIPTS_DIR, Receipt
from shards.upkeep.verify import verify


def repair(shards_dir: Path) -> list[str]:
    """Remove damaged shards with their receipts, and the index where anything is wrong; return what was removed.

    Shards are judged by their receipts, so this works without a sound index too. Run ``nd pack`` afterwards: it packs
    what is missing and writes tables and index again.

    Args:
        shards_dir: Folder that ``nd pack`` wrote, or began to write.
    """
    removed = []
    for receipt_path in sorted((shards_dir / RECEIPTS_DIR).glob("*.json")):
        try:
            receipt = Receipt.model_validate(read_json(receipt_path))
        except (DataError, ValidationError):
            receipt_path.unlink()
            removed.append(str(receipt_path.relative_to(shards_dir)))
            continue
        shard = shards_dir / receipt.shard.path
        if not shard.is_file() or sha256_file(shard) != receipt.shard.sha256:
            shard.unlink(missing_ok=True)
            receipt_path.unlink()
            removed.append(receipt.shard.path)
    if (shards_dir / INDEX_NAME).is_file() and (removed or verify(shards_dir)):
        (shards_dir / INDEX_NAME).unlink()
        removed.append(INDEX_NAME)
    return removed
