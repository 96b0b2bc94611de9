"""What a stage was trained from, and that it is finished: plain facts on disk, compared key by key."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nd_dist.config import Config
from nd_dist.config.data import OWN_SPLIT
from nd_dist.errors import CheckpointError
from nd_dist.files import hash_json, read_json, write_json

FORMAT = 1
DONE = "done.json"
MODEL = "model"
BEST = "best"
SCRATCH = "scratch"

_NOT_RESULT = {  # of config.training: changes of these keep the trained numbers (up to rounding)
    "stages",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "validation_images",
    "reader_threads",
    "zero_stage",
    "shard_layers",
    "monitors",
    "profile",
    "checkpoint_every_s",
    "compile",
    "deepspeed",
    "per_target",
}
_STOPPING = ("validate_every", "validation_images")


def stage_dir(run_dir: Path, stage: int) -> Path:
    """Return the folder of a stage's checkpoints, model and record."""
    return run_dir / "checkpoints" / f"stage{stage}"


def ridge_dir(run_dir: Path) -> Path:
    """Return the folder of the ridge regression that is fitted beside a network, as a control."""
    return run_dir / "checkpoints" / "ridge"


def training_fingerprint(
    config: Config, data: Mapping[str, object], stage: int, start: str = SCRATCH, ranks: int = 1
) -> dict[str, object]:
    """Return the facts that decide a stage's result, as flat JSON keys.

    Args:
        config: The recipe.
        data: Identities of the data that the stage reads; see ``check_fingerprint``.
        stage: 1 or 2.
        start: Hash of the model that the stage starts from, or "scratch".
        ranks: Ranks of the training; they count where the batch grows with them.
    """
    training = config.training.model_dump(mode="json")
    kept = {key: value for key, value in training.items() if key not in _NOT_RESULT}
    if training["early_stop"]:
        kept.update({key: training[key] for key in _STOPPING})
    kept["steps"], kept["samples_per_subject"] = config.training.schedule(stage)
    if training["start"] == "random":
        del kept["start"], kept["ridge_rate_share"]  # as before there was a choice
    if training["teacher"] is None:
        del kept["latent_negatives"]  # they are the teacher's
    if stage == 1:
        del kept["sessions"]  # stage 1 uses all sessions of the other subjects
    facts: dict[str, object] = {f"training.{key}": value for key, value in kept.items()}
    unused = {"ridge_penalty"} if config.decoder.kind == "tokens" else {"ridge_penalty", "kind", "brain_tokens"}
    decoder = config.decoder.model_dump(mode="json", exclude=unused)
    facts.update({f"decoder.{key}": value for key, value in decoder.items()})
    facts.update({"data.subjects": sorted(config.data.subjects), "seed": config.seed})
    if config.data.split != OWN_SPLIT:
        facts["data.split"] = config.data.split
    if training["rows_per_rank"] is not None:
        facts["launch.ranks"] = ranks
    facts.update({**data, "stage": stage, "start": start})
    return facts


def check_fingerprint(wanted: Mapping[str, object], found: Mapping[str, object], where: Path) -> None:
    """Refuse to go on with something that another recipe made.

    Data are known by ``data.content``, a hash of what is read; what earlier versions made has ``data.index`` alone,
    the hash of all that was packed.

    Raises:
        CheckpointError: names every key that differs.
    """
    unasked = "data.index" if "data.content" in found else "data.content"
    keys = (wanted.keys() | found.keys()) - {unasked}
    differing = sorted(key for key in keys if wanted.get(key) != found.get(key))
    if not differing:
        return
    raise CheckpointError(
        "This run folder was made with another recipe.",
        where=str(where),
        expected=", ".join(f"{key}={wanted.get(key)}" for key in differing),
        found=", ".join(f"{key}={found.get(key)}" for key in differing),
        todo="choose another run_dir, or set these keys back",
    )


def write_best(folder: Path, name: str, step: int, found: Mapping[str, float]) -> None:
    """Make ``folder / name`` the best model of a stage, then remove the others that were.

    Args:
        folder: Folder of the stage.
        name: Model folder, complete.
        step: Optimizer steps that it has seen.
        found: What the validation found.
    """
    write_json(folder / f"{BEST}.json", {"format": FORMAT, "name": name, "step": step, "validation": dict(found)})
    for other in folder.glob(f"{BEST}-*"):
        if other.name != name:
            shutil.rmtree(other)


def model_dir(folder: Path, which: Literal["last", "best"]) -> Path:
    """Return the folder of a stage's last or best model; it is not there before there is one."""
    pointer = folder / f"{BEST}.json"
    if which == "last":
        return folder / MODEL
    return folder / (str(read_json(pointer)["name"]) if pointer.is_file() else BEST)


def write_done(folder: Path, facts: Mapping[str, object], step: int, loss: float, model_sha256: str) -> None:
    """Write a stage's completion record: the only proof that the stage is finished."""
    record = {
        "format": FORMAT,
        "step": step,
        "loss": loss,
        "model_sha256": model_sha256,
        "fingerprint": dict(facts),
        "fingerprint_sha256": hash_json(dict(facts)),
    }
    write_json(folder / DONE, record)


def read_done(folder: Path) -> dict[str, Any]:
    """Return a stage's completion record, an empty one where the stage is not finished."""
    if not (folder / DONE).exists():
        return {}
    record: dict[str, Any] = read_json(folder / DONE)
    return record
