"""The decoder that a run evaluates: where it lies, and whether it fits what is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nd_dist.config import Config
from nd_dist.config.data import OWN_SPLIT
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.files import read_json
from nd_dist.schema import GUIDANCE, INITIAL, SEMANTIC, TARGETS

if TYPE_CHECKING:
    from shards.format.index import Index


def decoder_dir(config: Config) -> Path:
    """Return the folder of the decoder that a run evaluates: the last or the best one of its last stage."""
    from nd_dist.training.records import model_dir, stage_dir

    return model_dir(stage_dir(config.run_dir, max(config.training.stages)), config.evaluation.checkpoint)


def check_decoder(config: Config, index: Index) -> str:
    """Refuse a decoder that is not there, or lacks a subject or a target that is evaluated."""
    folder = decoder_dir(config)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no {config.evaluation.checkpoint} decoder of stage {max(config.training.stages)} in the run.",
            where=str(folder),
            todo="run `nd train` with the same recipe and run_dir=, or set evaluation.embeddings=ground_truth",
        )
    check_split(config)
    told = read_json(folder / "config.json")
    voxels = {int(subject): number for subject, number in told["num_voxels"].items()}
    wanted = {subject: index.num_voxels[subject] for subject in config.evaluated_subjects if subject in index.subjects}
    if differing := sorted(wanted.items() - voxels.items()):
        raise ConfigError(
            "The decoder was not trained on what is evaluated.",
            where=str(folder),
            expected=", ".join(f"subject {subject} with {number} voxels" for subject, number in differing),
            found=", ".join(f"subject {subject} with {number} voxels" for subject, number in voxels.items()),
            todo="choose evaluation.subjects=, or the run_dir= of the other training",
        )
    targets = [target["name"] for target in told["targets"]]
    guidance = GUIDANCE[: len(config.sampler.layer_scale)] if config.sampler.kappa > 0 else ()
    needed = (SEMANTIC, INITIAL, *guidance)
    if missing := [name for name in needed if name not in targets]:
        raise ConfigError(
            f"The decoder does not predict {', '.join(missing)}, which the sampler needs.",
            where=str(folder),
            found=", ".join(targets),
            todo=f"train with training.targets=[{','.join(TARGETS)}], or all networks with --all-targets",
        )
    return str(folder)


def check_split(config: Config) -> None:
    """Refuse a decoder that may have seen what would be tested."""
    for done in (*config.run_dir.glob("checkpoints/*/done.json"), *config.run_dir.glob("*/checkpoints/*/done.json")):
        trained = read_json(done)["fingerprint"].get("data.split", OWN_SPLIT)
        if trained != config.data.split:
            raise CheckpointError(
                "The decoder was trained on another split, so it may have seen what would be tested.",
                where=str(done),
                expected=f"data.split={config.data.split}",
                found=f"data.split={trained}",
                todo="evaluate with the split of the training, or train in another run_dir",
            )
