"""Captions from COCO's annotation files (``captions_train2017.json``, ``captions_val2017.json``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nd_dist.files import read_json
from shards.sources.files import reading

SPLITS = ("train2017", "val2017")


def captions_path(folder: Path, split: str) -> Path:
    """Return the annotation file of a COCO split."""
    return folder / f"captions_{split}.json"


def read_captions(folder: Path, splits: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """Return every COCO image's captions that are not blank, in the order of their annotation ids.

    Args:
        folder: Where the annotation files lie.
        splits: COCO splits to read, e.g. ``train2017``.

    Raises:
        DataError: a file is missing or is not COCO's format.
    """
    captions: dict[int, list[tuple[int, str]]] = {}
    for split in splits:
        path = captions_path(folder, split)
        with reading(path, "A file of COCO's captions"):
            for annotation in read_json(path)["annotations"]:
                entry = int(annotation["id"]), str(annotation["caption"]).strip()
                captions.setdefault(int(annotation["image_id"]), []).append(entry)
    return {coco_id: tuple(text for _, text in sorted(entries) if text) for coco_id, entries in captions.items()}
