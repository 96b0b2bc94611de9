"""An index of shards with NSD's own sizes, and tables of a few trials and all pictures; no shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_memory import SHAPES, VOXELS
from shards.format.codec import PICTURES
from shards.format.index import FORMAT, TRIALS, VERSION, index_id
from shards.format.tables import IMAGE_ROW, TEST, TRAIN, TRIAL_ROW, Table, table_bytes


def write_index(folder: Path) -> Path:
    """Write the index and return the folder."""
    subject = {"sessions": 40, "trials": 27_000, "test_trials": 3000, "images": 10_000, "test_images": 1000,
               "normalization": "session-train", "normalization_text": "", "source": {}}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, PICTURES: (425, 425, 3)}
    feature = {"dtype": "<f2", "header": 128, "rows": 73_000, "source": {}}
    content: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "num_images": 73_000, "tables": _write_tables(folder),
        "shards": [], "source": {},
        "voxels": {"member": "voxels.npy", "dtype": "<f2", "header": 128},
        "subjects": {str(number): {**subject, "voxels": voxels} for number, voxels in VOXELS.items()},
        "features": {name: {**feature, "shape": list(shape)} for name, shape in shapes.items()},
        "accepted": [],
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({**content, "id": index_id(content)}))
    return folder


def _write_tables(folder: Path) -> dict[str, Any]:
    """Write the tables: of every subject ten training trials and one test trial."""
    trials = np.zeros(11 * len(VOXELS), dtype=TRIAL_ROW)
    trials["subject"], trials["session"] = np.repeat(list(VOXELS), 11), 1
    trials["image"] = np.arange(len(trials))
    trials["split"] = np.where(np.arange(len(trials)) % 11 == 0, TEST, TRAIN)
    tables: dict[str, Table] = {TRIALS: trials, PICTURES: np.zeros(73_000, dtype=IMAGE_ROW)}
    (folder / "index").mkdir(parents=True, exist_ok=True)
    told = {}
    for name, table in tables.items():
        content, path = table_bytes(table), f"index/{name}.npy"
        (folder / path).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        told[name] = {"path": path, "bytes": len(content), "sha256": sha256, "rows": len(table)}
    return told
