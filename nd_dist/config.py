"""The configuration: frozen values, one class per concern, checked once at construction, unknown keys refused.

This file says what can be set and in which range. Reading recipes, overrides and files is ``launch.recipe``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nd_dist.errors import ConfigError
from nd_dist.location import Location, parse_location
from nd_dist.schema import TARGETS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
SubjectId = Annotated[int, Field(ge=1)]
Scalar = bool | int | float | str


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, docstrings under the fields become their description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a refused URL may hold a password
    )


class PhantomConfig(Section):
    """The made-up NSD that `nd phantom` writes (counts of the real one: 8 subjects, 40 sessions of 750 trials)."""

    num_subjects: Positive = 4
    """Subjects; each has its own number of voxels and its own brain grid."""
    num_sessions: Annotated[int, Field(ge=2)] = 9
    """Sessions of a complete subject; the last subject but one misses some."""
    trials_per_session: Annotated[int, Field(ge=10)] = 80
    """Trials in a session; each image is shown three times."""
    num_shared: Positive = 24
    """Test images, seen by every subject."""
    num_voxels: Annotated[int, Field(ge=50)] = 400
    """About how many voxels the ROI of a subject has (subjects differ)."""
    noise_ceiling: Fraction = 0.5
    """Share of a good voxel's single-trial variance that the picture explains."""


class DataConfig(Section):
    """What is packed from NSD, and how."""

    reader: Literal["nsd", "mindeye2"] = "nsd"
    """Layout of `nsd_root`: NSD's own files or MindEye2's published ones."""
    betas: str = "betas_fithrf_GLMdenoise_RR"
    """Version of the single-trial betas (folder name)."""
    betas_format: Literal["auto", "nifti", "hdf5"] = "auto"
    """File format of the betas; auto takes HDF5 where both exist (it reads by session chunk)."""
    roi: str = "nsdgeneral"
    """Name of the ROI volume whose positive labels select the voxels."""
    subjects: tuple[SubjectId, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Subjects to pack and to train on."""
    max_sessions: Positive | None = None
    """Take only the first sessions of every subject (37 = the early release); none takes all."""
    normalization: Literal["session-train", "mindeye1", "mindeye2", "brain-diffuser"] = "session-train"
    """Z-scoring: per session without the test images (default, and what MindEye2's paper says), per session with
    all trials (mindeye1, mindeye2's notebook), or by the training trials of all sessions (brain-diffuser)."""
    voxel_dtype: Literal["float16", "float32"] = "float16"
    """How voxels are stored."""
    captions: str = "${nsd_root}/captions"
    """Folder with COCO's `captions_train2017.json` and `captions_val2017.json`."""
    targets: tuple[str, ...] = TARGETS
    """Target stores to make: c, z, g02 .. g12."""
    target_dtype: Literal["float16", "float32"] = "float16"
    """How targets are stored."""
    int8_targets: tuple[str, ...] = ()
    """Targets that get a second store of half the size: int8 with one scale a channel (about 1 % relative error)."""
    images_per_shard: Positive = 512
    """Images in one shard of a target store."""
    pictures: Literal["none", "test", "all"] = "test"
    """Whose pictures are packed as PNG, so that evaluation needs the shards only."""

    @model_validator(mode="after")
    def _known_targets(self) -> DataConfig:
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ValueError(f"unknown targets {unknown}; known: {list(TARGETS)}")
        if unknown := [name for name in self.int8_targets if name not in self.targets]:
            raise ValueError(f"int8 stores are made from targets; {unknown} are not in data.targets")
        return self


class FrozenConfig(Section):
    """How the frozen networks turn pictures and captions into targets, and pictures into guidance features."""

    vae_encode: Literal["mode", "sample"] = "mode"
    """z from the mode of the VAE's posterior, or a sample of it (as the released targets were made)."""
    normalize: Literal["imagenet", "clip"] = "imagenet"
    """Pixel statistics before the guidance CLIP (the released code uses ImageNet's with CLIP)."""
    antialias: bool = False
    """Antialiased resize before the guidance CLIP (torchvision's tensor default: off up to 0.16, on from 0.17)."""
    batch_size: Positive = 32
    """Pictures per forward pass when targets are extracted."""
    dtype: Dtype = "float32"
    """Computation dtype of the frozen networks."""


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


class SamplerConfig(Section):
    """The guided sampler (method: NeuralDiffuser section III; defaults are the released behaviour)."""

    kappa: Annotated[float, Field(ge=0)] = 300_000.0
    """Guidance scale."""
    eta: Fraction = 0.2
    """Guided share of the denoising steps: int(steps run x eta) steps, from the first."""
    num_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """DDIM steps of the full schedule."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of the schedule that is run: int(num_steps x strength) steps."""
    cfg_scale: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale."""
    sag_scale: Annotated[float, Field(ge=0)] = 0.75
    """Self-attention guidance scale; 0 is off (one UNet pass less per step)."""
    layer_scale: tuple[float, ...] = (1.5, 1.2, 1.0, 1.0, 1.0, 1.0)
    """Factors a_l of the guidance layers, applied after the norm weights."""
    x0_form: Literal["official", "ddim"] = "official"
    """Image estimate of the guidance: with (1 - abar) as released, or sqrt(1 - abar) as DDIM defines it."""
    noise_timestep: Literal["official", "first_step"] = "official"
    """Timestep that z is noised to: int(strength x 1000) of the steps run, or the first step's."""
    noise: Literal["per_image", "official"] = "per_image"
    """per_image: a seed per (image, repeat); official: the same draws for all images (seed 42, draw 41 r)."""
    noise_device: Literal["cpu", "cuda"] = "cpu"
    """Whose generator draws the noise: the CPU's (the same everywhere), or a GPU's (as the released code drew it)."""
    uint8: Literal["round", "truncate"] = "round"
    """How pixels in [0,1] become bytes."""
    dtype: Dtype = "float32"
    """Dtype of UNet and VAE; latents, schedule and loss stay float32."""
    unet_gradient: bool = True
    """Differentiate the guidance loss through the UNet; false is the cheaper stop-gradient approximation."""
    guidance_decode: Literal["full", "half"] = "full"
    """Latents that the guidance decodes: all, or averaged over 2 x 2 (a quarter of the VAE's work; approximation)."""
    on_non_finite: Literal["stop", "report"] = "stop"
    """NaN or infinity in a sample: stop the run, or report that sample, make it grey and go on."""
    intermediates: Literal["none", "strip", "gif"] = "none"
    """Also write the pictures after every step beside the reconstructions: one PNG an image, or one GIF a repeat
    (every step is decoded: some 40 % more work)."""
    checkpointing: Literal["auto", "always"] = "auto"
    """Recompute activations in the guidance gradient instead of keeping them: where memory asks for it, or always."""
    max_rows: Positive | None = None
    """Most samples in one pass of a network (none: as many as fit into free memory; a few on a CPU)."""
    compile: bool = False
    """Run the passes without gradient through torch.compile: minutes at the start, faster steps on a GPU."""


class EvaluationConfig(Section):
    """Reconstructions and metrics."""

    subjects: tuple[SubjectId, ...] | None = None
    """Subjects to reconstruct (none: the training's target subject)."""
    num_images: Positive | None = None
    """Test images to reconstruct, first ids first (none: all)."""
    num_repeats: Positive = 5
    """Reconstructions of an image."""
    embeddings: Literal["decoded", "ground_truth"] = "decoded"
    """Targets from the decoder, or the pictures' own (the ceiling)."""
    baseline: bool = True
    """Also reconstruct without guidance (kappa 0), for comparison."""
    controls: bool = False
    """Also run the controls: shuffled decoder inputs (chance), the nearest training image, true targets (ceiling)."""
    judges_dir: Path | None = None
    """Folder of the field's metric networks (docs/evaluation.md); none: those beside the model, or pixel metrics."""
    protocol: str = "nd"
    """Named metric protocol."""
    z_calibration: Literal["test_set", "stored", "none"] = "test_set"
    """Statistics that re-standardise predicted z: of all test predictions (as published), of the training, or none."""
    batch_size: Positive = 4
    """Images in one work unit (all repeats of an image ride together)."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the test images for the intervals."""


class SweepConfig(Section):
    """The grid of `nd sweep`, and the rule that chooses a point. Subjects are those of ``evaluation.subjects``."""

    kappa: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e5, 3e5, 1e6)
    """Guidance scales."""
    eta: tuple[Fraction, ...] = (0.1, 0.2, 0.5, 1.0)
    """Guided-step proportions."""
    sag: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Scales of self-attention guidance (none: the recipe's)."""
    seed: tuple[Count, ...] = ()
    """Seeds of noise and prior samples (none: the recipe's)."""
    axes: dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]] = {}
    """Further axes: configuration key -> values, e.g. {sampler.cfg_scale: [3, 7.5]}; keys that change how pictures are
    made from a trained decoder."""
    select: str = "pixcorr"
    """Metric that chooses a point on training images: its mean over subjects (and seeds), in its own direction;
    empty: no choice."""
    rule: Literal["best", "least_guidance"] = "best"
    """best: the point with the best mean; least_guidance: the smallest kappa, then eta, whose mean lies within the
    interval of the best."""
    num_images: Positive = 16
    """Training images of each subject on which the point is chosen (a fixed random choice)."""
    report: Literal["grid", "chosen"] = "grid"
    """Test images are reconstructed at every point, or at the chosen one (and without guidance) only."""

    def all_axes(self) -> dict[str, tuple[Scalar, ...]]:
        """Return every axis but kappa and eta: configuration key -> values."""
        named: dict[str, tuple[Scalar, ...]] = {"sampler.sag_scale": self.sag, "seed": self.seed}
        return {**{key: values for key, values in named.items() if values}, **self.axes}


class RemoteConfig(Section):
    """Shards that lie on a server (`shards_dir` is a URL): every node reads them through a cache on its own disk."""

    cache_dir: Path | None = None
    """Folder on the node's own disk (none: `nd_dist-cache-<user id>` in the system's temporary folder)."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Size of the cache in gigabytes (1e9 bytes); the least recently used shards go first."""
    s3_endpoint: str | None = None
    """URL of an S3-compatible server such as MinIO (none: AWS, or what AWS_ENDPOINT_URL says)."""

    @field_validator("s3_endpoint")
    @classmethod
    def _no_credentials(cls, endpoint: str | None) -> str | None:
        return endpoint and str(parse_location(endpoint))


class LaunchConfig(Section):
    """How ranks are started."""

    ranks: Positive | None = None
    """Ranks of every stage (none: one per GPU, or one where there is none)."""
    threads_per_rank: Positive = 1
    """OMP_NUM_THREADS of every rank on CPU; part of the numbers, so it does not follow the number of cores."""
    timeout_s: Annotated[int, Field(ge=5)] = 600
    """Longest wait of a collective call, in seconds."""
    stop_grace_s: Annotated[int, Field(ge=5)] = 45
    """Seconds that ranks get to save after a stop was asked for; then they are killed."""
    interface: str = ""
    """Network interface of the rendezvous and of gloo, NCCL and MPI, e.g. ib0 (empty: each chooses)."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to try for the rendezvous on the first host; 0 takes any free one."""
    python: str = ""
    """Interpreter of ranks and agents, e.g. a script that runs Python in a container (empty: the one `nd` runs in)."""


class SlurmConfig(Section):
    """What `nd submit` asks Slurm for."""

    nodes: Positive = 1
    """Nodes of a job."""
    ranks_per_node: Positive = 1
    """Ranks on a node (one per GPU)."""
    gpus_per_node: Count = 0
    """GPUs of a node; 0 asks for none."""
    cpus_per_rank: Positive = 1
    """CPU cores of a rank."""
    time_min: Positive = 1440
    """Time limit in minutes."""
    signal_s: Positive = 120
    """Seconds before the time limit at which the ranks are asked to save."""
    requeue: bool = True
    """Whether a job that ran out of time or was preempted goes back into the queue and continues."""
    partition: str = ""
    """Partition (empty: the site's default)."""
    account: str = ""
    """Account (empty: the user's default)."""
    options: tuple[str, ...] = ()
    """Further sbatch options, e.g. --constraint=a100."""
    setup: tuple[str, ...] = ()
    """Shell lines before the command, e.g. module load cuda, source /path/venv/bin/activate."""


class Config(Section):
    """A recipe: everything that a command needs. Top-level names are stable, people script against them."""

    seed: Count = 0
    """Seed of the run; every other seed derives from it and the unit of work."""
    nsd_root: Path = Path("nsd")
    """Folder of NSD (or of a phantom NSD)."""
    shards_dir: Location = Path("shards_out")
    """Folder of the packed shards; for training and evaluation also a URL (http, https, s3) of such a folder."""
    run_dir: Path = Path("runs/default")
    """Folder of this run: config, events, checkpoints, reconstructions, metrics, report."""
    model: str = "CompVis/stable-diffusion-v1-4"
    """Stable Diffusion: a folder in Hugging Face layout, or a name in the local Hugging Face cache."""
    guidance_model: str = "openai/clip-vit-base-patch32"
    """The guidance CLIP: a folder in Hugging Face layout, or a name in the local Hugging Face cache."""
    phantom: PhantomConfig = PhantomConfig()
    data: DataConfig = DataConfig()
    frozen: FrozenConfig = FrozenConfig()
    decoder: DecoderConfig = DecoderConfig()
    training: TrainingConfig = TrainingConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    launch: LaunchConfig = LaunchConfig()
    slurm: SlurmConfig = SlurmConfig()
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _subjects_exist(self) -> Config:
        wanted = {self.training.target_subject, *(self.evaluation.subjects or ())}
        if missing := sorted(wanted - set(self.data.subjects)):
            raise ValueError(f"subjects {missing} are not in data.subjects {list(self.data.subjects)}")
        return self

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

    def replaced(self, settings: Mapping[str, Scalar]) -> Config:
        """Return this configuration with other values of some dotted keys, checked again.

        Raises:
            ValidationError: a key is unknown or a value out of range.
        """
        values = self.model_dump()
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            (values[section] if section else values)[name] = value
        return Config.model_validate(values)
