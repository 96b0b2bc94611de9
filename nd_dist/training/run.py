"""A whole training: both stages of a recipe, resumed by calling it again. The entry of rank programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nd_dist.checkpoint import read_pointer
from nd_dist.compute.device import rank_device
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, RankFailure
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.models.heads import latent_downscale
from nd_dist.schema import INITIAL
from nd_dist.seeds import unit_seed
from nd_dist.training import ridge
from nd_dist.training.checkpoints import StageCheckpoints
from nd_dist.training.engine.engine import Engine, connect, open_monitor
from nd_dist.training.engine.saving import full_state
from nd_dist.training.engine.sharded import shard_large_layers, share_weights
from nd_dist.training.loop import Stage, train_stage
from nd_dist.training.objective.objectives import Objective
from nd_dist.training.objective.teacher import PictureTeacher
from nd_dist.training.profile import profiled, trace_path
from nd_dist.training.ranks import GlobalRows, on_main
from nd_dist.training.records import (
    BEST,
    MODEL,
    SCRATCH,
    check_fingerprint,
    read_done,
    ridge_dir,
    stage_dir,
    training_fingerprint,
    write_best,
    write_done,
)
from nd_dist.training.ridge_start import start_at_ridge
from nd_dist.training.schedule import OneCycle
from nd_dist.training.source import StageRequest, TrainingSource, stage_length, stage_request, stage_specs
from nd_dist.training.validation import Validation
from nd_dist.world import World

_LOGGER = logging.getLogger(__name__)


def train(
    config: Config,
    world: World,
    source: TrainingSource,
    events: EventLog,
    should_stop: Callable[[], bool],
) -> None:
    """Train the recipe's stages in order; finished stages are skipped, a started one continues. Every rank calls it.

    Leaves ``run_dir/checkpoints/stageN/model`` (the trained decoder, ``Decoder.load`` reads it), the best one by
    validation (``best.json`` names its folder) and ``done.json``.

    Args:
        config: The recipe.
        world: Who this rank is.
        source: The data.
        events: This rank's event file.
        should_stop: Asked every step; true saves the state and raises ``Requeue`` on all ranks.

    Raises:
        ConfigError: recipe and data do not fit each other.
        CheckpointError: the run folder holds another recipe's training, or cannot be read or written.
        Requeue: stopped on demand.
        NonFiniteError: the training diverged or the data is damaged.
        RankFailure: a GPU has too little memory.
    """
    for stage in config.training.stages:
        try:
            if config.decoder.kind != "ridge":
                _run_stage(stage, config, world, source, events, should_stop)
            if stage == ridge.STAGE and (config.decoder.kind == "ridge" or config.fits_ridge_beside):
                _fit_ridge(config, world, source, events, should_stop)
        except torch.OutOfMemoryError as error:
            raise RankFailure(
                "The GPU has too little memory for this training.",
                where=f"stage {stage}, rank {world.rank} of {world.size}",
                found=str(error).partition(". Of the allocated")[0],
                todo="take more ranks, training.zero_stage=2, training.dtype=bfloat16, --all-targets, or "
                "training.gradient_accumulation=2 with half of training.samples_per_subject "
                "(`nd train ... --dry-run` counts what is needed)",
            ) from error


def _fit_ridge(
    config: Config, world: World, source: TrainingSource, events: EventLog, should_stop: Callable[[], bool]
) -> None:
    """Fit a ridge regression, as the decoder in the place of stage 2 or as a control beside it."""
    connect(world, config.launch.timeout_s)
    is_control = config.decoder.kind != "ridge"
    folder = ridge_dir(config.run_dir) if is_control else stage_dir(config.run_dir, ridge.STAGE)
    request = stage_request(config, ridge.STAGE, world.size)
    facts = on_main(lambda: ridge.ridge_facts(config, source.identity(request)))
    is_finished = on_main(lambda: bool(_finished(folder, facts)))
    if is_control:
        if not is_finished:
            ridge.fit(config, world, source, events, should_stop, facts, request, folder)
        return
    if is_finished:
        events.write("stage_skipped", stage=ridge.STAGE, reason="finished with the same recipe")
        return
    events.write("stage_start", stage=ridge.STAGE, subjects=list(request.subjects), start=SCRATCH)
    error = ridge.fit(config, world, source, events, should_stop, facts, request, folder)
    events.write("stage_done", stage=ridge.STAGE, step=0, loss=error)


def _run_stage(
    stage: int,
    config: Config,
    world: World,
    source: TrainingSource,
    events: EventLog,
    should_stop: Callable[[], bool],
) -> None:
    """Train one stage; see ``train``. What it holds on the device is free when it returns."""
    gather, training = connect(world, config.launch.timeout_s), config.training
    request = stage_request(config, stage, world.size)
    steps, learning_rate = stage_length(config, request)
    start_dir, facts, is_finished = on_main(partial(_stage_state, config, source, stage, world.size))
    if is_finished:
        events.write("stage_skipped", stage=stage, reason="finished with the same recipe")
        return
    events.write("stage_start", stage=stage, subjects=list(request.subjects), start=facts["start"])

    # The network, its loss, what trains it
    device, rows = rank_device(world), GlobalRows(request.num_rows, world, gather)
    teacher = _teacher(config, world, source, stage, events)
    decoder = _decoder(config, source, request, start_dir, teacher is not None, world)
    parameters = parameter_table(decoder)
    events.write("model", stage=stage, parameters=parameters)
    _LOGGER.info("stage %d: parameters %s", stage, parameters)
    folder = stage_dir(config.run_dir, stage)
    if training.start == "ridge" and not on_main(lambda: read_pointer(folder)):
        started = on_main(partial(start_at_ridge, decoder, source, request, device, has_space=start_dir is not None))
        events.write("ridge_start", stage=stage, targets=started)
    layers = shard_large_layers(decoder, request.num_rows, world, device) if training.shard_layers else {}
    share_weights(decoder, world, device)
    if training.compile:
        decoder.compile_heads()
    objective = Objective(decoder, training, steps, unit_seed(config.seed, "stage", stage), rows, teacher)
    cycle = OneCycle(steps, learning_rate, training.warmup_fraction, training.cycle_momentum)
    engine = Engine(objective, training, cycle, rows.per_rank, world, config.launch.timeout_s, layers)
    events.write("sharded_layers", stage=stage, layers=list(layers))

    # What looks at it and keeps it
    checkpoints = StageCheckpoints(folder, engine, facts, events, config.launch.stop_grace_s)
    validation = Validation(source, request.subjects[0], training, world, gather, on_main(source.image_classes))
    if not validation.image_ids:
        events.write("validation_off", stage=stage, reason=f"there are no {validation.split} images")
    stream, trace = source.open_stream(request), trace_path(config.run_dir, stage, world.rank)
    with closing(checkpoints), closing(stream), profiled(trace, training.profile) as after_step:
        parts = Stage(
            stage,
            steps,
            request.num_rows * training.gradient_accumulation,
            should_stop,
            partial(validation, decoder) if validation.image_ids else None,
            validation.split,
            partial(_keep_best, engine, decoder, folder, checkpoints),
            open_monitor(training, config.run_dir, stage),
            after_step,
        )
        end = train_stage(parts, engine, stream, checkpoints, events)
    digest = on_main(partial(decoder.save, folder / MODEL, full_state(engine)))
    on_main(partial(write_done, folder, facts, end.step, end.loss, digest))
    engine.close()
    events.write("stage_done", stage=stage, step=end.step, loss=end.loss)


def _stage_state(
    config: Config, source: TrainingSource, stage: int, num_ranks: int
) -> tuple[Path | None, dict[str, object], bool]:
    """Return what the run folder says of a stage: the model to start from, its fingerprint, whether it is finished.

    Stage 2 starts from stage 1 of the same run folder; without one (only stage 2 was asked for) from scratch.

    Raises:
        CheckpointError: the folder holds another recipe's training, or stage 1 was asked for and is not finished.
    """

    def facts_of(number: int, start: str) -> dict[str, object]:
        data = source.identity(stage_request(config, number, num_ranks))
        return training_fingerprint(config, data, number, start, num_ranks)

    start_dir, start, first = None, SCRATCH, stage_dir(config.run_dir, 1)
    if stage == 2:
        record = read_done(first)
        if record:
            _finished(first, facts_of(1, SCRATCH))
            start_dir, start = first / MODEL, str(record["model_sha256"])
        elif 1 in config.training.stages or first.exists():
            raise CheckpointError(
                "Stage 2 cannot start: stage 1 of this run folder is not finished.",
                where=str(first),
                todo="train it first (training.stages=[1,2]), or remove the folder to train stage 2 from scratch",
            )
    facts = facts_of(stage, start)
    return start_dir, facts, bool(_finished(stage_dir(config.run_dir, stage), facts))


def _finished(folder: Path, facts: Mapping[str, object]) -> dict[str, Any]:
    """Return a stage's completion record, an empty one where it is not finished; another recipe's is refused."""
    record = read_done(folder)
    if record:
        check_fingerprint(facts, record["fingerprint"], folder)
    return record


def _teacher(
    config: Config, world: World, source: TrainingSource, stage: int, events: EventLog
) -> PictureTeacher | None:
    """Return the teacher of z's contrastive term; none, and a word about it, where the recipe names none."""
    if INITIAL not in config.training.targets:
        return None
    if config.training.teacher is None:
        events.write("term_off", stage=stage, term="z/contrastive", reason="no teacher model")
        return None
    latent_side = next(spec.shape[-1] for spec in source.specs if spec.name == INITIAL)
    map_side, seed = latent_side // latent_downscale(config.decoder), unit_seed(config.seed, "teacher", stage)
    return PictureTeacher(config.training.teacher, map_side, seed, rank_device(world))


def _decoder(
    config: Config,
    source: TrainingSource,
    request: StageRequest,
    start_dir: Path | None,
    has_student: bool,
    world: World,
) -> Decoder:
    """Return the decoder that a stage begins with: on rank 0, elsewhere its shapes, without memory."""
    num_voxels = {subject: source.num_voxels[subject] for subject in request.subjects}
    specs = stage_specs(config, source)
    with torch.random.fork_rng(), torch.device("cpu" if world.is_main else "meta"):
        torch.manual_seed(unit_seed(config.seed, "weights", request.stage))
        if start_dir is not None and world.is_main:
            return Decoder.load_for_subjects(start_dir, num_voxels)
        return Decoder(config.decoder, num_voxels, specs, student=has_student)


def _keep_best(
    engine: Engine,
    decoder: Decoder,
    folder: Path,
    checkpoints: StageCheckpoints,
    step: int,
    found: Mapping[str, float],
) -> None:
    """Let the model be written as the best one so far, and the one before forgotten."""
    name, state = f"{BEST}-{step:07d}", full_state(engine)

    def write() -> None:
        decoder.save(folder / name, state)
        write_best(folder, name, step, found)

    if engine.world.is_main:
        checkpoints.write_later(write)


def parameter_table(decoder: Decoder) -> dict[str, int]:
    """Return the number of parameters of every voxel encoder and of every part of every head."""
    table: dict[str, int] = {}
    for name, parameter in decoder.named_parameters():
        part = ".".join(name.split(".")[:3])
        table[part] = table.get(part, 0) + parameter.numel()
    return table
