"""What a command needs, checked in seconds before ranks are started for hours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nd_dist.config import Config, EvaluationConfig
from nd_dist.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from launch.plans.plan import LaunchPlan
    from shards.format.index import Index


def preflight(command: str, config: Config, ranks: int) -> None:
    """Raise the error that a command would meet later, if it can be known now.

    Raises:
        DataError: NSD, the shards or a target store is missing.
        ConfigError: packing into a URL, a subject is not in the shards, or the ranks do not divide the batch.
        CheckpointError: there is no trained decoder to evaluate.
    """
    if command == "pack":
        from shards.packing.pack import plan_pack

        _ = config.shards_folder
        plan_pack(config)
        return
    from shards.format.index import Index

    index = Index.read(config.shards_dir, config.remote)
    _check_subjects(config, index)
    if command == "train":
        _check_training(config, index, ranks)
    else:
        _check_evaluation(config, index)


def require_starters(plan: LaunchPlan, home: Path) -> None:
    """Refuse a plan whose starting program is missing, or would stumble over the user's own file.

    Args:
        plan: What is to be started.
        home: The user's home folder; DeepSpeed reads ``.deepspeed_env`` there.

    Raises:
        ConfigError: pdsh or srun is not on PATH, or a line of ``.deepspeed_env`` is not NAME=VALUE.
    """
    for program, package in (("pdsh", "pdsh"), ("srun", "slurm-client")):
        if program in plan.argv and shutil.which(program) is None:
            raise ConfigError(f"There is no {program} on this machine.", todo=f"apt-get install {package}")
    own = home / ".deepspeed_env"
    if plan.hosts and "deepspeed.launcher.runner" in plan.argv and own.is_file():
        for number, line in enumerate(own.read_text(encoding="utf-8").splitlines(), start=1):
            if "=" not in line:
                raise ConfigError(
                    "DeepSpeed fails on a line of your own environment file.",
                    where=f"{own}, line {number}",
                    expected="NAME=VALUE; no comment, no empty line",
                    found=line or "an empty line",
                )


def _check_subjects(config: Config, index: Index) -> None:
    """Refuse subjects that were not packed."""
    wanted = {*config.data.subjects, *config.evaluated_subjects, config.training.target_subject}
    if missing := sorted(wanted - set(index.subjects)):
        raise ConfigError(
            f"Subjects {missing} are not in the shards.",
            where=str(config.shards_dir),
            expected=f"some of {sorted(index.subjects)}",
            todo="choose data.subjects= and training.target_subject= from these, or pack them",
        )


def _check_targets(config: Config, index: Index, targets: tuple[str, ...]) -> None:
    """Refuse targets that were not packed."""
    if missing := [name for name in targets if name not in index.features]:
        raise DataError(
            f"Target stores {missing} are not in the shards.",
            where=str(config.shards_dir),
            found=", ".join(sorted(index.features)),
            todo=f"run `nd pack` with data.targets=[{','.join(config.data.targets)}] (int8 stores: data.int8_targets)",
        )


def _check_training(config: Config, index: Index, ranks: int) -> None:
    """Refuse stages without subjects and batches that the ranks do not divide."""
    from shards.format.codec import stores_of

    names = config.training.targets
    _check_targets(config, index, stores_of(names, config.training.int8_targets))
    if config.training.teacher is not None and "z" in names:
        _check_teacher(config.training.teacher, index)
    if 1 in config.training.stages and set(config.data.subjects) == {config.training.target_subject}:
        raise ConfigError(
            "Stage 1 trains on all subjects but the target, and there is no other.",
            where="data.subjects",
            todo="add subjects, or train stage 2 alone with training.stages=[2]",
        )
    for stage in config.training.stages:
        samples = config.training.samples_per_subject[stage - 1]
        if samples % ranks:
            raise ConfigError(
                f"{ranks} ranks do not divide the {samples} samples of a subject in a step of stage {stage}.",
                where="training.samples_per_subject",
                todo="choose a multiple of the number of ranks: the global batch must not depend on it",
            )


def _check_teacher(teacher: str, index: Index) -> None:
    """Refuse a teacher that is not there, or that would have no pictures to look at."""
    from nd_dist.frozen.folders import resolve_folder

    resolve_folder(teacher)
    if "img" not in index.features:
        raise DataError(
            "The teacher looks at pictures, and the shards hold none.",
            where="training.teacher",
            todo="run `nd pack` with data.pictures=all, or leave training.teacher out",
        )


def _check_evaluation(config: Config, index: Index) -> None:
    """Refuse an evaluation without pictures, networks, a protocol or a decoder."""
    from nd_dist.evaluation.points.axes import check_axes
    from nd_dist.frozen.folders import resolve_folder

    check_metrics(config.evaluation)
    if "img" not in index.features:
        raise DataError(
            "The shards hold no pictures to compare with.",
            where=str(config.shards_dir),
            todo="run `nd pack` with data.pictures=test",
        )
    for name in (config.model, config.guidance_model):
        resolve_folder(name)
    check_axes(config)
    if config.evaluation.embeddings == "decoded":
        _check_decoder(config)


def check_metrics(evaluation: EvaluationConfig) -> None:
    """Refuse a protocol, groups of images or a folder of metric networks that do not exist."""
    from nd_dist.evaluation.scoring.groups import read_groups
    from nd_dist.metrics.protocols import protocol_named

    protocol_named(evaluation.protocol)
    if evaluation.image_groups is not None:
        read_groups(evaluation.image_groups)
    judges = evaluation.judges_dir
    if judges is not None and not judges.is_dir():
        raise ConfigError(
            "The folder of metric networks is not there.",
            where="evaluation.judges_dir",
            found=str(judges),
            todo="docs/evaluation.md lists the files that belong into it",
        )


def decoder_dir(config: Config) -> Path:
    """Return the folder of the decoder that a run evaluates: that of its last stage."""
    return config.run_dir / "checkpoints" / f"stage{max(config.training.stages)}" / "model"


def _check_decoder(config: Config) -> None:
    """Refuse an evaluation of a decoder that is not there."""
    folder = decoder_dir(config)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no decoder of stage {max(config.training.stages)} in the run.",
            where=str(folder),
            todo="run `nd train` with the same recipe and run_dir=, or set evaluation.embeddings=ground_truth",
        )
