"""Captions from COCO's annotation files (``captions_train2017.json``, ``captions_val2017.json``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nd_dist.errors import DataError
from nd_dist.files import read_json

SPLITS = ("train2017", "val2017")


def captions_path(folder: Path, split: str) -> Path:
    """Return the annotation file of a COCO split."""
    return folder / f"captions_{split}.json"


def read_captions(folder: Path, splits: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """Return every COCO image's captions, in the order of their annotation ids.

    Args:
        folder: Where the annotation files lie.
        splits: COCO splits to read, e.g. ``train2017``.

    Raises:
        DataError: a file is missing or is not COCO's format.
    """
    captions: dict[int, list[tuple[int, str]]] = {}
    for split in splits:
        path = captions_path(folder, split)
        content = read_json(path)
        try:
            for annotation in content["annotations"]:
                captions.setdefault(int(annotation["image_id"]), []).append(
                    (int(annotation["id"]), str(annotation["caption"]).strip())
                )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "A caption file is not in COCO's format.", where=str(path), found=f"{type(error).__name__}: {error}"
            ) from error
    return {coco_id: tuple(text for _, text in sorted(entries)) for coco_id, entries in captions.items()}
