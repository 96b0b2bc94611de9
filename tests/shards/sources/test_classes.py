"""COCO's categories of NSD's pictures, in COCO's own format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nd_dist.errors import DataError
from shards.sources.classes import read_classes
from shards.sources.nsd_layout import NsdLayout


def write_world(folder: Path) -> Path:
    """Write NSD's table of three pictures, and instances of two of them and of one that NSD lacks."""
    table = NsdLayout(folder).stim_info
    table.parent.mkdir(parents=True)
    table.write_text(",cocoId,cocoSplit,nsdId\n0,70,train2017,0\n1,90,val2017,1\n2,80,train2017,2\n")
    categories = [{"id": 1, "name": "dog"}, {"id": 18, "name": "bench"}]
    for split, pairs in (("train2017", [(70, 18), (70, 1), (70, 1), (55, 1)]), ("val2017", [(90, 1)])):
        annotations = [{"image_id": image, "category_id": category} for image, category in pairs]
        content = {"categories": categories, "annotations": annotations}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_cocos_categories_become_nsds_image_ids(tmp_path: Path) -> None:
    folder = write_world(tmp_path)
    assert read_classes(folder, folder) == {"bench": (0,), "dog": (0, 1)}


def test_a_file_of_ones_own_names_classes_too(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"faces": [4, 2]}')
    assert read_classes(tmp_path, tmp_path / "own.json") == {"faces": (2, 4)}


def test_instances_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = write_world(tmp_path)
    (folder / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2017\.json"):
        read_classes(folder, folder)
