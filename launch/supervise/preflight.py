"""What a command needs, checked in seconds before ranks are started for hours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nd_dist.config import Config, EvaluationConfig
from nd_dist.errors import CheckpointError, ConfigError, DataError

FEW_ROWS = 4
"""Rows of a rank below which its messages outweigh its work (docs/training.md, "Many GPUs")."""

if TYPE_CHECKING:
    from launch.plans.plan import LaunchPlan
    from shards.format.index import Index


def preflight(command: str, config: Config, _ranks: int = 1) -> None:
    """Raise the error that a command would meet later, if it can be known now; any number of ranks will do.

    Raises:
        DataError: NSD, the shards or a target store is missing.
        ConfigError: packing into a URL, or a subject is not in the shards.
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
        _check_training(config, index)
    else:
        _check_evaluation(config, index)


def advice(command: str, config: Config, ranks: int, is_asked: bool = False) -> list[str]:
    """Return what is worth knowing of a command that passed ``preflight``: memory, ranks without use, a better way.

    Args:
        command: Only `train` has some.
        config: Its recipe.
        ranks: Ranks that would be started.
        is_asked: Count memory also where no GPU is at hand (seconds).

    Raises:
        ConfigError: this machine's GPUs are too small.
    """
    if command != "train":
        return []
    if config.decoder.kind == "ridge":
        return [_ridge_cost(config)]
    from launch.supervise.memory import gpu_bytes, memory_note, needed_bytes
    from nd_dist.training.source import stage_request
    from shards.format.index import Index

    training, notes = config.training, [_ridge_cost(config)] if config.fits_ridge_beside else []
    if config.decoder.heads == "single" and len(training.targets) > 1:
        notes.append(f"{len(training.targets)} networks are trained as one; --all-targets trains each by itself")
    rows = min(stage_request(config, stage, ranks).num_rows for stage in training.stages)
    if rows < FEW_ROWS * ranks:
        notes.append(
            f"{ranks} ranks share the {rows} rows of a step: more time goes into messages than into work. "
            "--all-targets and --subjects run many trainings on few ranks each; training.rows_per_rank grows the batch"
        )
    available = gpu_bytes()
    if available or is_asked:
        index = Index.read(config.shards_dir, config.remote)
        specs = [spec for spec in index.target_specs if spec.name in training.targets]
        notes.append(memory_note(needed_bytes(config, index.num_voxels, specs, ranks), available, config, ranks))
    return notes


def _ridge_cost(config: Config) -> str:
    """Return what a ridge regression takes, in words; images are counted by the index, before any is read.

    Raises:
        ConfigError: this machine's GPUs are too small.
    """
    from launch.supervise.memory import gpu_bytes
    from nd_dist.training.ridge import Cost
    from shards.format.index import Index

    index, training = Index.read(config.shards_dir, config.remote), config.training
    subject, specs = index.subjects[training.target_subject], index.target_specs
    share = 1.0 if training.sessions is None else min(1.0, len(training.sessions) / subject.sessions)
    num_images = round((subject.images - subject.test_images) * share * (1.0 - training.heldout_fraction))
    cost = Cost.of(num_images, subject.voxels, [spec for spec in specs if spec.name in training.targets])
    if 0 < (available := gpu_bytes()) < cost.device_bytes:
        raise ConfigError(
            "A ridge regression needs more memory than a GPU has.",
            expected=f"{cost.device_bytes / 1e9:.1f} GB",
            found=f"{available / 1e9:.1f} GB",
            todo="fit it on the CPU, with no GPU in sight (CUDA_VISIBLE_DEVICES=)",
        )
    return cost.describe()


def require_starters(plan: LaunchPlan) -> None:
    """Refuse a plan whose starting program is missing.

    Raises:
        ConfigError: pdsh or srun is not on PATH.
    """
    for program, package in (("pdsh", "pdsh"), ("srun", "slurm-client")):
        if program in plan.argv and shutil.which(program) is None:
            raise ConfigError(f"There is no {program} on this machine.", todo=f"apt-get install {package}")


def require_gpus(where: str, ranks: int, gpus: int) -> None:
    """Refuse more training ranks on a host than it has GPUs: NCCL does not let two share one.

    Args:
        where: The host.
        ranks: Ranks that will run there.
        gpus: GPUs that it shows; 0 trains on the CPU, with any number of ranks.

    Raises:
        ConfigError: there are too many.
    """
    if 0 < gpus < ranks:
        raise ConfigError(
            "There are more training ranks than GPUs on a host.",
            where=where,
            expected=f"at most {gpus} ranks",
            found=ranks,
            todo=f"use --ranks {gpus} (slots={gpus} in a hostfile); two trainings on one GPU are two runs",
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


def _check_training(config: Config, index: Index) -> None:
    """Refuse stages without subjects, and targets that are not there."""
    from shards.format.codec import stores_of

    names = config.training.targets
    _check_targets(config, index, stores_of(names, config.training.int8_targets))
    if config.training.teacher is not None and "z" in names:
        _check_teacher(config.training.teacher, index)
    is_network = config.decoder.kind != "ridge"  # a ridge regression skips stage 1
    if is_network and 1 in config.training.stages and set(config.data.subjects) == {config.training.target_subject}:
        raise ConfigError(
            "Stage 1 trains on all subjects but the target, and there is no other.",
            where="data.subjects",
            todo="add subjects, or train stage 2 alone with training.stages=[2]",
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
    if (classes := evaluation.image_classes) is not None and not classes.is_dir():
        read_groups(classes)
    judges = evaluation.judges_dir
    if judges is not None and not judges.is_dir():
        raise ConfigError(
            "The folder of metric networks is not there.",
            where="evaluation.judges_dir",
            found=str(judges),
            todo="docs/evaluation.md lists the files that belong into it",
        )


def decoder_dir(config: Config) -> Path:
    """Return the folder of the decoder that a run evaluates: the last or the best one of its last stage."""
    from nd_dist.training.records import model_dir, stage_dir

    return model_dir(stage_dir(config.run_dir, max(config.training.stages)), config.evaluation.checkpoint)


def _check_decoder(config: Config) -> None:
    """Refuse an evaluation of a decoder that is not there."""
    folder = decoder_dir(config)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no {config.evaluation.checkpoint} decoder of stage {max(config.training.stages)} in the run.",
            where=str(folder),
            todo="run `nd train` with the same recipe and run_dir=, or set evaluation.embeddings=ground_truth",
        )
