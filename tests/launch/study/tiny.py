"""A very small study: one network, the same with one session, a ridge regression; two tables."""

from __future__ import annotations

from pathlib import Path

import yaml

SETTINGS = {
    "phantom.num_subjects": 3, "phantom.num_sessions": 2, "phantom.trials_per_session": 24, "phantom.num_shared": 6,
    "phantom.num_voxels": 60, "data.subjects": [1, 2, 3], "decoder.kind": "neuraldiffuser",
    "decoder.hidden_size": 16, "training.steps": [4, 4],
    "training.samples_per_subject": [2, 4], "training.checkpoint_every": 2, "sampler.num_steps": 4,
    "sampler.kappa": 10,
    "evaluation.num_images": 3, "evaluation.num_repeats": 1, "evaluation.batch_size": 1, "evaluation.bootstrap": 100,
    "evaluation.image_groups": None, "evaluation.image_classes": None,
}  # fmt: skip


def write_study(folder: Path, **fields: object) -> str:
    """Write the study, whose folders lie below ``folder``, with other values of some fields; return its path."""
    places = {"nsd_root": str(folder / "nsd"), "shards_dir": str(folder / "shards")}
    study = {
        "study_dir": str(folder / "study"),
        "sources": {"phantom": {"recipe": "demo", "phantom_data": True, "subjects": [1, 2]}},
        "settings": {**SETTINGS, **places},
        "decoders": {
            "network": {},
            "one session": {"settings": {"training.sessions": [1]}, "stage1_of": "network"},
            "ridge": {"settings": {"decoder.kind": "ridge", "training.stages": [2]}},
        },
        "runs": {
            "unguided": {"settings": {"sampler.kappa": 0}},
            "guided": {},
            "grid": {"grid": {"sampler.kappa": [0, 10, 20], "sampler.eta": [0.5, 1.0]}},
            "true": {"settings": {"evaluation.embeddings": "ground_truth"}},
            "one session": {"decoder": "one session"},
            "ridge": {"decoder": "ridge", "settings": {"sampler.kappa": 0}},
        },
        "tables": [
            {
                "title": "Parts",
                "rows": {"none": "unguided", "guided": "guided", "less data": "one session", "ridge & SD": "ridge"},
                "against": "none",
                "published": ["MindEye2"],
            },
            {"title": "Guidance", "rows": {"without": "unguided", "with": "grid"}, "against": "without"},
        ],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**study, **fields}, sort_keys=False))
    return str(path)
