"""Sections about the decoder and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nd_dist.config.base import Count, Dtype, Fraction, Positive, Section, SubjectId
from nd_dist.schema import TARGETS


class DecoderConfig(Section):
    """The trainable network: voxel encoders, backbone, heads, prior."""

    heads: Literal["joint", "single"] = "joint"
    """joint: one shared space with all heads; single: every target has its own network (as published)."""
    hidden_size: Positive = 4096
    """Width h of the subject-shared space."""
    num_blocks: Positive = 4
    """Mixer blocks of the backbone, residual blocks of the z network."""
    mixer: Literal["official", "single_residual"] = "official"
    """official: the published mixer (an exact affine map at sequence length 1); single_residual: the repaired one."""
    backbone_dropout: Fraction = 0.15
    """Dropout in the mixer."""
    initial_voxel_dropout: Fraction = 0.5
    """Dropout in the voxel encoder of the z network."""
    initial_dropout: Fraction = 0.25
    """Dropout in the residual blocks of the z network."""
    initial_channels: tuple[Positive, Positive, Positive] = (64, 128, 256)
    """Channels of the three up blocks of the z network."""
    prior_depth: Count = 6
    """Transformer layers of the diffusion prior; 0 trains the backbone itself with the prior's MSE."""
    prior_dim_head: Positive = 52
    """Width of one attention head of the prior."""
    prior_timesteps: Positive = 100
    """Diffusion steps that the prior is trained on."""
    prior_sample_steps: Positive = 20
    """Steps when sampling from the prior."""
    prior_drop: Fraction = 0.2
    """Probability to replace condition or target by the learned null embedding."""


class TrainingConfig(Section):
    """Two stages of training with DeepSpeed."""

    target_subject: SubjectId = 1
    """Stage 1 trains on all other subjects of `data.subjects`, stage 2 on this one."""
    stages: Annotated[tuple[Literal[1, 2], ...], Field(min_length=1)] = (1, 2)
    """Stages to run, in order; stage 2 starts from stage 1's model where there is one."""
    targets: tuple[str, ...] = TARGETS
    """Targets to train heads for."""
    sessions: tuple[Positive, ...] | None = None
    """Sessions of the target subject used in stage 2 (none: all; one session is the "1 hour" setting)."""
    steps: tuple[Positive, Positive] = (107_100, 107_100)
    """Optimizer steps of stage 1 and stage 2."""
    samples_per_subject: tuple[Positive, Positive] = (6, 42)
    """Trials of each subject in a global step, in stage 1 and stage 2; must be a multiple of the number of ranks."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak of the one-cycle schedule, which counts global steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW weight decay."""
    decay: Literal["official", "weights"] = "official"
    """What decays: all but the biases outside the voxel encoders (as released: LayerNorm's weights and the voxel
    encoders' biases too), or weight matrices and embeddings only."""
    warmup_fraction: Annotated[float, Field(gt=0, lt=1)] = 2 / 150
    """Share of the steps until the peak learning rate."""
    cycle_momentum: bool = True
    """Cycle beta1 .95 -> .85 -> .95 with the learning rate, as the released code does."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Maximum global gradient norm; 0 is off, as published."""
    gradient_accumulation: Positive = 1
    """Micro-steps per optimizer step."""
    dtype: Dtype = "float32"
    """Training precision."""
    heldout_fraction: Fraction = 0.0
    """Share of the training images that is not trained on, by image, the same in every run: a sweep chooses its
    guidance point there."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage."""
    prior_weight: Annotated[float, Field(ge=0)] = 30.0
    """Weight of the prior's MSE."""
    contrastive_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the contrastive loss (MixCo, then SoftCLIP)."""
    mixco_fraction: Fraction = 49 / 150
    """Share of the steps trained with MixCo before SoftCLIP."""
    quirks: Literal["fixed", "official"] = "fixed"
    """MixCo's permutation offsets and target diagonal: repaired, or as released."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept per stage."""
    validate_every: Positive = 1000
    """Steps between validations."""
    validation_images: Positive = 300
    """Test images that a validation looks at (each with all its repeats), lowest ids first."""
    early_stop: Count = 0
    """Validations without a lower loss after which a stage ends; 0 is off, as published."""
    shard_layers: bool = True
    """Divide the columns of layers with more weights than rows to move among the ranks (voxel encoders above all), so
    that their gradients are never sent; false gives every parameter to DeepSpeed."""
    teacher: str | None = None
    """Folder of the ConvNeXt teacher of z's contrastive term; none leaves the term out."""
    monitors: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ()
    """Where DeepSpeed's monitor sends the curves besides the event files."""
    profile: bool = False
    """Write a torch profiler trace of some steps of every stage to `run_dir/profile`."""
    reader_threads: Positive = 2
    """Reader threads of one rank's stream."""
    repeats: Literal["trials", "mean"] = "trials"
    """A sample is a single trial (as published), or an image with the mean of the subject's trials of it."""
    int8_targets: bool = False
    """Read the targets' int8 stores (`data.int8_targets`): half the bytes, about 1 % relative error."""

    @model_validator(mode="after")
    def _known_targets(self) -> TrainingConfig:
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"unknown targets {unknown}; known: {list(TARGETS)}")
        return self
