"""A whole training: both stages of a recipe, resumed by calling it again. The entry of rank programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from nd_dist.config import Config
from nd_dist.device import rank_device
from nd_dist.errors import CheckpointError
from nd_dist.events import EventLog
from nd_dist.models.decoder import Decoder
from nd_dist.models.heads import latent_downscale
from nd_dist.models.statistics import write_z_statistics
from nd_dist.schema import INITIAL
from nd_dist.seeds import unit_seed
from nd_dist.training.calibration import z_statistics
from nd_dist.training.checkpoints import StageCheckpoints
from nd_dist.training.collective import on_main
from nd_dist.training.engine.engine import Engine, connect, open_monitor
from nd_dist.training.gather import Gather
from nd_dist.training.loop import Hooks, StagePlan, train_stage
from nd_dist.training.objective.objectives import Objective, Teacher
from nd_dist.training.objective.teacher import PictureTeacher, WithPictures
from nd_dist.training.profile import profiled, trace_path
from nd_dist.training.records import (
    BEST,
    MODEL,
    SCRATCH,
    check_fingerprint,
    read_done,
    stage_dir,
    training_fingerprint,
    write_best,
    write_done,
)
from nd_dist.training.schedule import OneCycle
from nd_dist.training.source import StageRequest, Stream, TrainingSource, stage_request, stage_specs
from nd_dist.training.validation import Validation
from nd_dist.world import World


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
    """
    gather = connect(world, config.launch.timeout_s)
    for stage in config.training.stages:
        request = stage_request(config, stage, world.size)
        start_dir, facts, is_finished = on_main(partial(_stage_state, config, source.index_id, stage))
        if is_finished:
            events.write("stage_skipped", stage=stage, reason="finished with the same recipe")
            continue
        events.write("stage_start", stage=stage, subjects=list(request.subjects), start=facts["start"])
        run = _StageRun(config, world, source, request, events, facts)
        run.train(run.build(start_dir), gather, should_stop)


def _stage_state(config: Config, index_id: str, stage: int) -> tuple[Path | None, dict[str, object], bool]:
    """Return what the run folder says of a stage: the model to start from, its fingerprint, whether it is finished.

    Raises:
        CheckpointError: the folder holds another recipe's training, or stage 1 is missing.
    """
    start_dir = _start_dir(config, index_id, stage)
    start = SCRATCH if start_dir is None else str(read_done(start_dir.parent)["model_sha256"])
    facts = training_fingerprint(config, index_id, stage, start)
    folder = stage_dir(config.run_dir, stage)
    record = read_done(folder)
    if record:
        check_fingerprint(facts, record["fingerprint"], folder)
    return start_dir, facts, bool(record)


def _start_dir(config: Config, index_id: str, stage: int) -> Path | None:
    """Return the model that a stage starts from; none: from scratch.

    Stage 2 starts from stage 1 of the same run folder; without one (only stage 2 was asked for) from scratch.

    Raises:
        CheckpointError: stage 1 was trained with another recipe, or was asked for and is not finished.
    """
    if stage == 1:
        return None
    folder = stage_dir(config.run_dir, 1)
    record = read_done(folder)
    if record:
        check_fingerprint(training_fingerprint(config, index_id, 1), record["fingerprint"], folder)
        return folder / MODEL
    if 1 in config.training.stages or folder.exists():
        raise CheckpointError(
            "Stage 2 cannot start: stage 1 of this run folder is not finished.",
            where=str(folder),
            todo="train it first (training.stages=[1,2]), or remove the folder to train stage 2 from scratch",
        )
    return None


class _StageRun:
    """One stage of one training: what its steps share.

    Args:
        config: The recipe.
        world: Who this rank is.
        source: The data.
        request: The stage's stream.
        events: This rank's event file.
        facts: The stage's fingerprint.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        source: TrainingSource,
        request: StageRequest,
        events: EventLog,
        facts: dict[str, object],
    ) -> None:
        self._config, self._world, self._source, self._request = config, world, source, request
        self._events, self._facts = events, facts
        self._folder = stage_dir(config.run_dir, request.stage)
        self._teacher = self._load_teacher() if INITIAL in request.targets else None

    def build(self, start_dir: Path | None) -> Decoder:
        """Return the decoder that the stage begins with, the same on every rank."""
        num_voxels = {subject: self._source.num_voxels[subject] for subject in self._request.subjects}
        specs = stage_specs(self._config, self._source)
        with torch.random.fork_rng():
            torch.manual_seed(unit_seed(self._config.seed, "weights", self._request.stage))
            if start_dir is not None:
                decoder = Decoder.load_for_subjects(start_dir, num_voxels)
            else:
                decoder = Decoder(self._config.decoder, num_voxels, specs, student=self._teacher is not None)
        self._events.write("model", stage=self._request.stage, parameters=parameter_table(decoder))
        return decoder

    def _load_teacher(self) -> Teacher | None:
        """Return the teacher of z's contrastive term; none, and a word about it, where the recipe names none."""
        if self._config.training.teacher is not None:
            seed = unit_seed(self._config.seed, "teacher", self._request.stage)
            side = next(s.shape[-1] for s in self._source.specs if s.name == INITIAL) // latent_downscale(
                self._config.decoder
            )
            return PictureTeacher(self._config.training.teacher, side, seed, rank_device(self._world))
        self._events.write("term_off", stage=self._request.stage, term="z/contrastive", reason="no teacher model")
        return None

    def train(self, decoder: Decoder, gather: Gather, should_stop: Callable[[], bool]) -> None:
        """Train the stage to its end and write model, statistics and record."""
        training, stage = self._config.training, self._request.stage
        plan = StagePlan.of(training, stage)
        engine = self._engine(decoder, gather, plan.total_steps)
        self._events.write("sharded_layers", stage=stage, layers=list(engine.sharded_layers))
        checkpoints = StageCheckpoints(self._folder, engine, self._facts, training.keep_checkpoints, self._events)
        monitor = open_monitor(training, self._config.run_dir, stage)
        validate = self._validation(decoder, gather)
        stream = self._stream()
        try:
            with profiled(trace_path(self._config.run_dir, stage, self._world.rank), training.profile) as after_step:
                hooks = Hooks(should_stop, validate, partial(self._keep_best, engine), monitor, after_step)
                end = train_stage(plan, engine, stream, checkpoints, self._events, hooks)
        finally:
            stream.close()
        digest = self._export(engine, self._folder / MODEL)
        self._calibrate()
        on_main(lambda: write_done(self._folder, self._facts, end.step, end.loss, digest))
        engine.close()
        self._events.write("stage_done", stage=stage, step=end.step, loss=end.loss)

    def _stream(self) -> Stream:
        """Return this rank's batches, with pictures where there is a teacher to look at them."""
        stream = self._source.open_stream(self._request)
        return stream if self._teacher is None else WithPictures(stream, self._source.pictures)

    def _validation(self, decoder: Decoder, gather: Gather) -> Callable[[], Mapping[str, float]] | None:
        """Return what looks at the model now and then; none where the subject has no test image."""
        validation = Validation(self._source, self._request.subjects[0], self._config.training, self._world, gather)
        if validation.num_images:
            return partial(validation, decoder)
        self._events.write("validation_off", stage=self._request.stage, reason="no test image was packed")
        return None

    def _keep_best(self, engine: Engine[Objective], step: int, found: Mapping[str, float]) -> None:
        """Write the model as the best one so far and forget the one before."""
        name = f"{BEST}-{step:07d}"
        self._export(engine, self._folder / name)
        on_main(lambda: write_best(self._folder, name, step, found))

    def _engine(self, decoder: Decoder, gather: Gather, total_steps: int) -> Engine[Objective]:
        """Return the engine around the stage's objective."""
        training = self._config.training
        seed = unit_seed(self._config.seed, "stage", self._request.stage)
        objective = Objective(decoder, training, total_steps, seed, gather, self._teacher)
        cycle = OneCycle(total_steps, training.learning_rate, training.warmup_fraction, training.cycle_momentum)
        return Engine(objective, training, cycle, self._request, self._world, self._config.launch.timeout_s)

    def _export(self, engine: Engine[Objective], folder: Path) -> str:
        """Write a model folder and return the weights' hash."""
        state = engine.full_state()
        return on_main(lambda: engine.objective.decoder.save(folder, state))

    def _calibrate(self) -> None:
        """Store the statistics of z over the stage's training images beside the model (stage 2: one subject)."""
        if INITIAL not in self._request.targets or len(self._request.subjects) > 1:
            return
        subject = self._request.subjects[0]
        decoder = Decoder.load(self._folder / MODEL).to(rank_device(self._world))
        chunks = self._source.training_rows(subject, self._request.sessions)
        statistics = z_statistics(decoder, subject, chunks, self._world)
        on_main(lambda: write_z_statistics(self._folder / MODEL, statistics))


def parameter_table(decoder: Decoder) -> dict[str, int]:
    """Return the number of parameters of every voxel encoder and of every part of every head."""
    table: dict[str, int] = {}
    for name, parameter in decoder.named_parameters():
        part = ".".join(name.split(".")[:3])
        table[part] = table.get(part, 0) + parameter.numel()
    return table
