"""What is in NSD's pictures: classes from a file of one's own, or COCO's categories (``instances_train2017.json``)."""

from __future__ import annotations

from pathlib import Path

from nd_dist.evaluation.scoring.groups import Groups, read_groups
from nd_dist.files import read_json
from shards.sources.coco import SPLITS
from shards.sources.files import read_columns, reading
from shards.sources.nsd_layout import NsdLayout


def instances_paths(folder: Path) -> list[Path]:
    """Return the files of COCO's instances in a folder."""
    return [folder / f"instances_{split}.json" for split in SPLITS]


def read_classes(nsd_root: Path, path: Path) -> Groups:
    """Return class -> ascending 0-based ids of the images that show it.

    Args:
        nsd_root: Folder of NSD, whose table of pictures says which COCO picture an image is.
        path: A JSON object of names and image ids, or the folder of COCO's ``instances_*.json`` of 2017.

    Raises:
        DataError: a file is missing or has another content.
    """
    if not path.is_dir():
        return read_groups(path)
    ids, _ = read_columns(NsdLayout(nsd_root).stim_info, ",", ["nsdId", "cocoId"], [])
    image_of = dict(zip(ids["cocoId"].tolist(), ids["nsdId"].tolist(), strict=True))
    found: dict[str, set[int]] = {}
    for file in instances_paths(path):
        with reading(file, "A file of COCO's instances"):
            content = read_json(file)
            names = {category["id"]: category["name"] for category in content["categories"]}
            for instance in content["annotations"]:
                if instance["image_id"] in image_of:
                    found.setdefault(names[instance["category_id"]], set()).add(image_of[instance["image_id"]])
    return {name: tuple(sorted(members)) for name, members in sorted(found.items())}
