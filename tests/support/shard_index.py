"""An index of shards with NSD's own sizes, and nothing else in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.training_memory import SHAPES, VOXELS
from shards.format.index import FORMAT, VERSION, index_id


def write_index(folder: Path) -> Path:
    """Write the index and return the folder."""
    subject = {"sessions": 40, "trials": 27_000, "test_trials": 3000, "images": 10_000, "test_images": 1000,
               "normalization": "session-train", "normalization_text": "", "source": {}}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, "img": (425, 425, 3)}
    feature = {"dtype": "<f2", "header": 128, "rows": 73_000, "source": {}}
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "num_images": 73_000, "tables": {}, "shards": [], "source": {},
        "voxels": {"member": "voxels.npy", "dtype": "<f2", "header": 128},
        "subjects": {str(number): {**subject, "voxels": voxels} for number, voxels in VOXELS.items()},
        "features": {name: {**feature, "shape": list(shape)} for name, shape in shapes.items()},
        "accepted": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").write_text(json.dumps({**content, "id": index_id(content)}))
    return folder
