"""Sections about the decoder and its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nd_dist.config.base import Count, Dtype, Fraction, Positive, Section, SubjectId
from nd_dist.schema import TARGETS


class DecoderConfig(Section):
    """What decodes voxels: voxel encoders, backbone, heads and prior of NeuralDiffuser, or a regression."""

    kind: Literal["neuraldiffuser", "tokens", "ridge"] = "neuraldiffuser"
    """neuraldiffuser: the published network; tokens: brain tokens and attention instead of its affine backbone; ridge:
    ridge regression of every target, in closed form (of this section only `ridge_penalty` is then looked at)."""
    brain_tokens: Positive = 16
    """kind=tokens: into how many tokens the shared space is cut; their width is `hidden_size` divided by it."""
    ridge_penalty: Annotated[float, Field(gt=0)] | None = None
    """Penalty of the ridge regression; none chooses one for every target by its leave-one-out error."""
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


class OwnSchedule(Section):
    """What a training of one target has of its own, for stage 1 and stage 2; none: what all have."""

    steps: tuple[Positive, Positive] | None = None
    samples_per_subject: tuple[Positive, Positive] | None = None


class TrainingConfig(Section):
    """Two stages of training with DeepSpeed."""

    target_subject: SubjectId = 1
    """Stage 1 trains on all other subjects of `data.subjects`, stage 2 on this one."""
    stages: Annotated[tuple[Literal[1, 2], ...], Field(min_length=1)] = (1, 2)
    """Stages to run, in order; stage 2 starts from stage 1's model where there is one."""
    start: Literal["random", "ridge"] = "random"
    """Where the network starts: random: as published; ridge: at the ridge regression of c and g that its affine parts
    can express, voxel encoders in stage 2 too (needs `decoder.mixer: official`)."""
    ridge_rate_share: Annotated[float, Field(gt=0)] = 0.125
    """Peak learning rate of what starts at the ridge regression, as a share of `learning_rate`."""
    targets: tuple[str, ...] = TARGETS
    """Targets to train heads for."""
    sessions: tuple[Positive, ...] | None = None
    """Sessions of the target subject used in stage 2 (none: all; one session is the "1 hour" setting)."""
    steps: tuple[Positive, Positive] = (107_100, 107_100)
    """Optimizer steps of stage 1 and stage 2."""
    samples_per_subject: tuple[Positive, Positive] = (6, 42)
    """Trials of each subject in a global step, in stage 1 and stage 2; ranks share them whatever their number."""
    per_target: dict[str, OwnSchedule] = Field(default_factory=dict)
    """Steps and samples of a training that has this one target, e.g. {z: {steps: [53550, 53550]}}; naming
    `training.steps` or `training.samples_per_subject` on the command line sets them for every target."""
    rows_per_rank: Positive | None = None
    """Rows of a step on one rank, instead of a batch that does not depend on the ranks: every subject gives as many
    trials as that needs. Where the batch so becomes k times what `samples_per_subject` says, the learning rate is
    multiplied by the square root of k, and the steps are divided by k."""
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
    """Share of the training images that is not trained on, by image, the same in every run: validation looks at them,
    and a sweep chooses its guidance point there."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed ZeRO stage; half precision needs 1 or more."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further settings of DeepSpeed by its own names, e.g. {zero_optimization: {overlap_comm: true}}; what follows
    from this section (batch, ZeRO stage, precision, clipping, optimizer, schedule) is refused here."""
    compile: bool = False
    """Run prior, projector and upsampler through torch.compile: minutes at the start, fewer kernels on a GPU."""
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
    checkpoint_every_s: Count = 0
    """Seconds after which a checkpoint is due as well; 0 counts steps only."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept per stage."""
    validate_every: Positive = 1000
    """Steps between validations."""
    validation_images: Positive = 300
    """Images that a validation looks at (each with three repeats), lowest ids first: held-out training images where
    there are some (`heldout_fraction`), else test images as published."""
    early_stop: Count = 0
    """Validations without a lower loss after which a stage ends; 0 is off, as published."""
    shard_layers: bool = True
    """Divide the columns of layers with more weights than rows to move among the ranks (voxel encoders above all), so
    that their gradients are never sent; false gives every parameter to DeepSpeed."""
    teacher: str | None = None
    """Folder of the ConvNeXt teacher of z's contrastive term; none leaves the term out."""
    latent_negatives: Positive = 14
    """Samples among which z's contrastive term looks for its image (as published: one GPU's share of a step)."""
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

    def schedule(self, stage: int) -> tuple[int, int]:
        """Return optimizer steps and samples per subject of a stage."""
        own = self.per_target.get(self.targets[0], OwnSchedule()) if len(self.targets) == 1 else OwnSchedule()
        steps, samples = own.steps or self.steps, own.samples_per_subject or self.samples_per_subject
        return steps[stage - 1], samples[stage - 1]

    @model_validator(mode="after")
    def _trains_rightly(self) -> TrainingConfig:
        # without ZeRO, DeepSpeed's half precision makes a dummy AdamW step at the start
        if self.zero_stage == 0 and self.dtype != "float32":
            raise ValueError(f"zero_stage 0 trains in float32 only, not in {self.dtype}: set training.zero_stage=1")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("training.compile needs whole weights: set training.zero_stage to 2 or less")
        if refused := _refused(self.deepspeed):
            raise ValueError(f"training.deepspeed: {refused}")
        return self

    @model_validator(mode="after")
    def _known_targets(self) -> TrainingConfig:
        if unknown := [name for name in (*self.targets, *self.per_target) if name not in TARGETS]:
            raise ValueError(f"unknown targets {unknown}; known: {list(TARGETS)}")
        return self


_OWN: Mapping[str, str] = {
    "train_batch_size": "samples_per_subject",
    "train_micro_batch_size_per_gpu": "samples_per_subject",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_clipping": "gradient_clip",
    "optimizer": "learning_rate, weight_decay",
    "scheduler": "warmup_fraction, cycle_momentum",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "dtype",
    "bf16.check_grad_overflow": "dtype",
    "fp16.enabled": "dtype",
    "torch_autocast": "dtype",
    "tensorboard": "monitors",
    "csv_monitor": "monitors",
    "wandb": "monitors",
}
"""Settings of DeepSpeed that follow from others: what to set instead, in the section `training`."""
_PASSED = {
    "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "flops_profiler", "comms_logger", "aio", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "steps_per_print",
}  # fmt: skip


def _refused(settings: Mapping[str, Any]) -> str:
    """Return what is wrong with settings for DeepSpeed; DeepSpeed itself checks the values."""
    inner = {f"{key}.{name}" for key, value in settings.items() if isinstance(value, Mapping) for name in value}
    for key in sorted({*settings, *inner}):
        if key in _OWN:
            return f"{key} follows from training.{_OWN[key]}"
        if "." not in key and key not in _PASSED:
            return f"{key} is not passed on; known: {', '.join(sorted(_PASSED))}"
    return ""
