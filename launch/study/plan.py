"""The stages of a study as a pure value: what there is to do, what each stage waits for, and where its result lies.

Work is shared by construction: decoders of equal data share one packing, a decoder is trained once for a subject and a
seed, and one evaluation of it makes the points of all runs, each once. Nothing here starts anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launch.grid.plan import file_name, subject_dir
from launch.study.study import Study, decoder_points, decoder_recipe, with_points
from launch.supervise.decoder import decoder_dir
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.files import hash_json

Kind = Literal["pack", "train", "evaluate"]
_DATA = {"nsd_root", "shards_dir", "model", "guidance_model", "phantom", "data", "frozen"}
_EVALUATION = {"evaluation", "sampler", "sweep", "score"}
_NOT_RESULT = {"run_dir", "launch", "slurm", "remote"}


@dataclass(frozen=True)
class Borrowed:
    """A finished stage of another run's training, which a run uses as if it were its own.

    Args:
        run_dir: Folder of the other run.
        number: 1 or 2.
    """

    run_dir: Path
    number: int


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Args:
        kind: Which command.
        config: Its recipe.
        source: Its data set.
        decoder: Whose decoder; of a packing the first that reads the shards.
        needs: Names of the stages that have to be done before.
        subject: None: all of them.
        seed: None: its result is the same for every seed.
        borrowed: What it starts from.
    """

    kind: Kind
    config: Config
    source: str
    decoder: str
    needs: tuple[str, ...] = ()
    subject: int | None = None
    seed: int | None = None
    borrowed: Borrowed | None = None

    @property
    def group(self) -> str:
        """What it has in common with the stages of other subjects and seeds."""
        return f"{self.kind} {self.source} {self.decoder}"

    @property
    def series(self) -> str:
        """What it has in common with the stages of other subjects."""
        return self.group if self.seed is None else f"{self.group} seed {self.seed}"

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return self.series if self.subject is None else f"{self.series} subject {self.subject}"

    @property
    def trains_grid(self) -> bool:
        """Whether it trains several networks, one for each target."""
        return self.kind == "train" and _has_grid(self.config)

    @property
    def result(self) -> Path:
        """File that is there when the stage is done."""
        if self.kind == "pack":
            return self.config.shards_folder / "index.json"
        if self.kind == "evaluate":
            return self.config.run_dir / "metrics.json"
        return decoder_dir(_evaluated(self.config)) / "config.json"

    @property
    def identity(self) -> str:
        """Hash of what decides its result."""
        without = _NOT_RESULT | (_EVALUATION if self.kind == "train" else set())
        values = self.config.model_dump(mode="json", exclude=without)
        kept = {key: value for key, value in values.items() if self.kind != "pack" or key in _DATA}
        start = list(self.borrowed.run_dir.parts[-4:]) if self.borrowed else []  # below the study's folder
        return hash_json([self.kind, kept, start])


def _has_grid(config: Config) -> bool:
    """Return whether a recipe trains several networks, one for each target."""
    own = config.decoder.kind != "ridge" and config.decoder.heads == "single"
    return own and len(config.training.targets) > 1


def _evaluated(config: Config) -> Config:
    """Return the recipe in the run folder that holds the decoder of all targets: a grid's lies inside its own."""
    folder = subject_dir(config, config.training.target_subject) if _has_grid(config) else config.run_dir
    return config.replaced({"run_dir": folder})


def plan_study(study: Study) -> tuple[Stage, ...]:
    """Return the stages of a study, each after those that it needs.

    Raises:
        ConfigError: a recipe is wrong, there is no run, or one folder of shards is to be packed in two ways.
    """
    if not study.runs:
        raise ConfigError("The study has no run.", where=str(study.study_dir), todo="docs/study.md shows a study file")
    packs: dict[str, Stage] = {}
    own: dict[str, Stage] = {}
    for decoder in study.decoders:
        for source in study.sources_of(decoder):
            for stage in _stages(study, source, decoder, packs):
                own.setdefault(stage.name, stage)
    return (*packs.values(), *own.values())


def _stages(study: Study, source: str, decoder: str, packs: dict[str, Stage]) -> Iterator[Stage]:
    """Yield the trainings and evaluations of a decoder on a data set; a fit comes again with every seed."""
    recipe = decoder_recipe(study, source, decoder)
    pack = _pack(packs, source, decoder, recipe.replaced({"run_dir": study.study_dir / "pack"}))
    points = decoder_points(study, source, decoder, recipe)
    parent, is_fit = study.decoders[decoder].stage1_of, recipe.decoder.kind == "ridge"
    for seed in study.seeds:
        for subject in study.sources[source].subjects:
            folder = run_dir(study, source, decoder, seed, subject)
            config = recipe.replaced({"run_dir": folder, "seed": seed, "training.target_subject": subject})
            train = Stage("train", config, source, decoder, pack, subject, seed)
            borrowed = None
            if is_fit:  # in closed form: no draw has a part in it
                fit = config.replaced({"run_dir": run_dir(study, source, decoder, None, subject), "seed": recipe.seed})
                train = replace(train, config=fit, seed=None)
                borrowed = Borrowed(fit.run_dir, max(fit.training.stages))
            elif parent:
                first = Borrowed(run_dir(study, source, parent, seed, subject), 1)
                train = replace(train, needs=(*pack, replace(train, decoder=parent).name), borrowed=first)
            yield train
            if points:
                evaluation = with_points(_evaluated(config), points)
                yield Stage("evaluate", evaluation, source, decoder, (train.name,), subject, seed, borrowed)


def run_dir(study: Study, source: str, decoder: str, seed: int | None, subject: int) -> Path:
    """Return the folder of a decoder's training."""
    own = study.study_dir / file_name(source) / file_name(decoder)
    return own / ("all-seeds" if seed is None else f"seed-{seed}") / f"subj{subject:02d}"


def _pack(packs: dict[str, Stage], source: str, decoder: str, recipe: Config) -> tuple[str, ...]:
    """Return the name of the stage that packs a decoder's shards, which joins ``packs``; none where they are a URL."""
    if not isinstance(recipe.shards_dir, Path):
        return ()
    stage = Stage("pack", recipe, source, decoder)
    first = packs.setdefault(str(recipe.shards_dir), stage)
    if first.identity != stage.identity:
        raise ConfigError(
            "One folder of shards is to be packed in different ways.",
            where=f"{first.source}, {first.decoder} and {source}, {decoder}: shards_dir={recipe.shards_dir}",
            todo="give one of them a shards_dir of its own",
        )
    return (first.name,)
