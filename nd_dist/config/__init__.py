"""The configuration: frozen values, one class per concern, checked once at construction, unknown keys refused.

This package says what can be set and in which range. Reading recipes, overrides and files is ``launch.recipe``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, model_validator

from nd_dist.config.base import Count, Dtype, Scalar, Section, Value
from nd_dist.config.data import DataConfig, FrozenConfig, PhantomConfig, RemoteConfig
from nd_dist.config.evaluation import EvaluationConfig, SamplerConfig, ScoreConfig, SweepConfig
from nd_dist.config.launch import LaunchConfig, SlurmConfig
from nd_dist.config.training import DecoderConfig, TrainingConfig
from nd_dist.errors import ConfigError
from nd_dist.location import Location

__all__ = [
    "Config",
    "DataConfig",
    "DecoderConfig",
    "Dtype",
    "EvaluationConfig",
    "FrozenConfig",
    "LaunchConfig",
    "PhantomConfig",
    "RemoteConfig",
    "SamplerConfig",
    "Scalar",
    "ScoreConfig",
    "SlurmConfig",
    "SweepConfig",
    "TrainingConfig",
    "Value",
]


class Config(Section):
    """A recipe: everything that a command needs. Top-level names are stable, people script against them."""

    seed: Count = 0
    """Seed of the run; every other seed derives from it and the unit of work."""
    nsd_root: Path = Path("nsd")
    """Folder of the data set: NSD, or another that `data.reader` reads, or a phantom."""
    shards_dir: Location = Path("shards_out")
    """Folder of the packed shards; for training and evaluation also a URL (http, https, s3) of such a folder."""
    run_dir: Path = Path("runs/default")
    """Folder of this run: config, events, checkpoints, reconstructions, metrics, report."""
    model: str = "CompVis/stable-diffusion-v1-4"
    """Stable Diffusion: a folder in Hugging Face layout, or a name in the local Hugging Face cache."""
    guidance_model: str = "openai/clip-vit-base-patch32"
    """The guidance CLIP: a folder in Hugging Face layout, or a name in the local Hugging Face cache."""
    tf32: bool = True
    """On GPUs that have it, float32 networks multiply in TF32 (10 bits of mantissa, several times faster), matrix
    products and convolutions alike; false: in float32."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits in every run (docs/gpu.md says what that buys and costs);
    a CPU always does."""
    phantom: PhantomConfig = PhantomConfig()
    data: DataConfig = DataConfig()
    frozen: FrozenConfig = FrozenConfig()
    decoder: DecoderConfig = DecoderConfig()
    training: TrainingConfig = TrainingConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    score: ScoreConfig = ScoreConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig = SlurmConfig()
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _subjects_exist(self, info: ValidationInfo) -> Config:
        """Refuse subjects that are not among the data's, as far as the command in the context uses them."""
        command = (info.context or {}).get("command", "")
        wanted = {self.training.target_subject, *(() if command == "train" else self.evaluation.subjects or ())}
        if command not in ("pack", "phantom") and (missing := sorted(wanted - set(self.data.subjects))):
            raise ValueError(f"subjects {missing} are not in data.subjects {list(self.data.subjects)}")
        return self

    @model_validator(mode="after")
    def _decoder_and_training_agree(self) -> Config:
        """Refuse a start that the network cannot have, and a ridge regression without its stage."""
        decoder, training = self.decoder, self.training
        is_affine = decoder.kind == "neuraldiffuser" and decoder.mixer == "official"
        if training.start == "ridge" and not is_affine:
            raise ValueError(
                "training.start=ridge needs decoder.kind=neuraldiffuser and decoder.mixer=official, "
                f"not {decoder.kind} and {decoder.mixer}"
            )
        if decoder.kind == "ridge" and 2 not in training.stages:
            raise ValueError("decoder.kind=ridge is fitted in stage 2, which training.stages leaves out")
        return self

    @property
    def made_stages(self) -> tuple[int, ...]:
        """Stages of training that are made: a ridge regression is fitted on the target subject alone."""
        return (2,) if self.decoder.kind == "ridge" else self.training.stages

    @property
    def fits_ridge_beside(self) -> bool:
        """Whether a ridge regression is fitted and evaluated beside a network of several targets, as a control."""
        training, is_network = self.training, self.decoder.kind != "ridge"
        is_asked = self.evaluation.controls and self.evaluation.embeddings == "decoded"
        is_whole = self.evaluated_subjects == (training.target_subject,) and len(training.targets) > 1
        return is_asked and is_network and is_whole and 2 in training.stages

    @property
    def shards_folder(self) -> Path:
        """Folder that is packed into.

        Raises:
            ConfigError: `shards_dir` is a URL.
        """
        if not isinstance(self.shards_dir, Path):
            raise ConfigError(
                "Shards are packed into a local folder, not to a URL.",
                where=f"shards_dir={self.shards_dir}",
                todo="pack into a folder, then copy it to the server as it is",
            )
        return self.shards_dir

    @property
    def evaluated_subjects(self) -> tuple[int, ...]:
        """Subjects whose test images are reconstructed."""
        return self.evaluation.subjects or (self.training.target_subject,)

    def flat(self) -> dict[str, Any]:  # Any: values of every kind
        """Return every setting by its dotted key, as plain values: ``{"sampler.kappa": 300000.0, ...}``."""
        found: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json").items():
            is_section = isinstance(getattr(self, key), Section)
            found |= {f"{key}.{name}": item for name, item in value.items()} if is_section else {key: value}
        return found

    def replaced(self, settings: Mapping[str, Any]) -> Config:  # Any: values of every kind
        """Return this configuration with other values of some dotted keys, checked again.

        Raises:
            ValidationError: a key is unknown or a value out of range.
        """
        values = self.model_dump()
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            (values[section] if section else values)[name] = value
        return Config.model_validate(values)
