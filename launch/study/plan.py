"""The stages of a study as a pure value: what there is to do, what each stage waits for, and where its result lies.

Work is shared by construction: decoders of equal data share one packing, a decoder is trained once for a subject and a
seed, and one evaluation of it makes the points of all runs, each once. Nothing here starts anything.
"""

from __future__ import annotations

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
_NOT_RESULT = {"launch", "slurm", "remote"}


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Args:
        kind: Which command.
        config: Its recipe.
        decoder: Whose decoder; of a packing the first that reads the shards.
        needs: Names of the stages that have to be done before.
        subject, seed: Of a packing 0.
        stage1_of: Folder of the run whose stage 1 it starts from; none: it trains its own.
    """

    kind: Kind
    config: Config
    decoder: str
    needs: tuple[str, ...] = ()
    subject: int = 0
    seed: int = 0
    stage1_of: Path | None = None

    @property
    def group(self) -> str:
        """What it has in common with the stages of other subjects and seeds."""
        return f"{self.kind} {self.decoder}"

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return self.group if self.kind == "pack" else f"{self.group} seed {self.seed} subject {self.subject}"

    @property
    def trains_grid(self) -> bool:
        """Whether it trains several networks, one for each target."""
        return self.kind == "train" and has_grid(self.config)

    @property
    def result(self) -> Path:
        """File that is there when the stage is done."""
        if self.kind == "pack":
            return self.config.shards_folder / "index.json"
        if self.kind == "evaluate":
            return self.config.run_dir / "metrics.json"
        return decoder_dir(evaluated(self.config)) / "config.json"

    @property
    def identity(self) -> str:
        """Hash of what decides its result."""
        without = _NOT_RESULT | (_EVALUATION if self.kind == "train" else set())
        values = self.config.model_dump(mode="json", exclude=without)
        kept = {key: value for key, value in values.items() if self.kind != "pack" or key in _DATA}
        return hash_json([self.kind, kept, str(self.stage1_of or "")])


def has_grid(config: Config) -> bool:
    """Return whether a recipe trains several networks, one for each target."""
    return config.decoder.heads == "single" and len(config.training.targets) > 1


def evaluated(config: Config) -> Config:
    """Return the recipe in the run folder that holds the decoder of all targets: a grid's lies inside its own."""
    folder = subject_dir(config, config.training.target_subject) if has_grid(config) else config.run_dir
    return config.replaced({"run_dir": folder})


def run_dir(study: Study, decoder: str, seed: int, subject: int) -> Path:
    """Return the folder of a decoder's training."""
    return study.study_dir / file_name(decoder) / f"seed-{seed}" / f"subj{subject:02d}"


def plan_study(study: Study) -> tuple[Stage, ...]:
    """Return the stages of a study, each after those that it needs.

    Raises:
        ConfigError: a recipe is wrong, there is no run, or one folder of shards is to be packed in two ways.
    """
    if not study.runs:
        raise ConfigError("The study has no run.", where=str(study.study_dir), todo="docs/study.md shows a study file")
    packs: dict[str, Stage] = {}
    own: list[Stage] = []
    for decoder, entry in study.decoders.items():
        recipe = decoder_recipe(study, decoder)
        pack = _pack(packs, decoder, recipe.replaced({"run_dir": study.study_dir / "pack"}))
        points = decoder_points(study, decoder, recipe)
        for seed in study.seeds:
            for subject in study.subjects:
                folder = run_dir(study, decoder, seed, subject)
                config = recipe.replaced({"run_dir": folder, "seed": seed, "training.target_subject": subject})
                train = Stage("train", config, decoder, pack, subject, seed)
                if entry.stage1_of:
                    parent = replace(train, decoder=entry.stage1_of).name
                    first = run_dir(study, entry.stage1_of, seed, subject)
                    train = replace(train, needs=(*pack, parent), stage1_of=first)
                own.append(train)
                if points:
                    evaluation = with_points(evaluated(config), points)
                    own.append(Stage("evaluate", evaluation, decoder, (train.name,), subject, seed))
    return (*packs.values(), *own)


def _pack(packs: dict[str, Stage], decoder: str, recipe: Config) -> tuple[str, ...]:
    """Return the name of the stage that packs a decoder's shards, which joins ``packs``; none where they are a URL."""
    if not isinstance(recipe.shards_dir, Path):
        return ()
    stage = Stage("pack", recipe, decoder)
    first = packs.setdefault(str(recipe.shards_dir), stage)
    if first.identity != stage.identity:
        raise ConfigError(
            "Two decoders pack one folder of shards in different ways.",
            where=f"decoders.{first.decoder} and decoders.{decoder}: shards_dir={recipe.shards_dir}",
            todo="give one of them a shards_dir of its own",
        )
    return (first.name,)
