"""Sections about reconstruction: the guided sampler, evaluation, sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nd_dist.config.base import Count, Dtype, Fraction, Positive, Scalar, Section, SubjectId, Value


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
    guidance: dict[str, float] = {"clip": 1.0}  # noqa: RUF012 - pydantic copies it
    """Guidance terms and their weights: clip (features of the layers), latent (the initial latent), pixels (the
    initial picture at 32 x 32), or a class of yours as module:Class (docs/sampler.md)."""
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
    compile: bool | Literal["cuda-graphs"] = False
    """Run the passes without gradient through torch.compile: minutes at the start, faster steps on a GPU;
    `cuda-graphs` also replays each pass as one CUDA graph, which spares its launches and keeps its memory."""


class EvaluationConfig(Section):
    """Reconstructions and metrics."""

    subjects: tuple[SubjectId, ...] | None = None
    """Subjects to reconstruct (none: the training's target subject)."""
    num_images: Positive | None = None
    """Test images to reconstruct, first ids first (none: all)."""
    image_ids: tuple[Count, ...] | None = None
    """Test images to reconstruct, by their 0-based ids (none: by number, as above)."""
    num_repeats: Positive = 5
    """Reconstructions of an image."""
    embeddings: Literal["decoded", "ground_truth"] = "decoded"
    """Targets from the decoder, or the pictures' own (the ceiling)."""
    checkpoint: Literal["last", "best"] = "last"
    """The model at the end of the training (as published), or the one with the lowest validation loss."""
    baseline: bool = True
    """Also reconstruct without guidance (kappa 0), for comparison."""
    controls: bool = False
    """Also run the controls: shuffled decoder inputs (chance), the nearest training image, true targets (ceiling)."""
    points: tuple[dict[str, Value], ...] = ()
    """Points to reconstruct at in the place of the recipe's own: settings in which each differs from the recipe, e.g.
    [{sampler.kappa: 0}, {evaluation.embeddings: ground_truth}]; {control: nearest} is a control."""
    judges_dir: Path | None = None
    """Folder of the field's metric networks (docs/evaluation.md); none: those beside the model, or pixel metrics."""
    protocol: str = "nd"
    """Named metric protocol."""
    z_calibration: Literal["test_set", "stored", "none"] = "test_set"
    """Statistics that re-standardise predicted z: of all test predictions (as published), of the training, or none."""
    two_repeats: Literal["mean", "official"] = "mean"
    """Voxels of an image that a subject saw twice only (possible for subjects 3, 4, 6, 8): the mean of a and b, or
    (2 a + b) / 3 as the released code scores it (it fills the missing third repeat with the first)."""
    calibrated: tuple[Literal["initial", "guidance", "semantic"], ...] = ("initial",)
    """Kinds of targets whose predictions the rule `z_calibration` re-standardises; published: z (initial) alone.
    Without a prior (`decoder.prior_depth=0`) predictions of guidance features are means with too small a spread."""
    calibrated_by: Literal["element", "target"] = "element"
    """What that rule scales: every element by a factor of its own (as published), or a target by one factor, which
    keeps the kind of thing that a caption's embedding says (docs/evaluation.md)."""
    image_groups: Path | None = None
    """JSON file that names groups of test images (name -> 0-based image ids) to be reported apart as well."""
    image_classes: Path | None = None
    """JSON file that names the classes of images (name -> 0-based ids, training images too), or the folder of COCO's
    instances_*.json: how much of the kind of thing is decoded is then reported as well."""
    batch_size: Positive = 4
    """Images in one work unit; on a GPU they ride in one forward batch, with all repeats."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the test images for the intervals."""
    keep_features: bool = False
    """Keep the judges' features of a point once it is scored (1 MB a picture with the field's judges); without them a
    change of the statistics judges its pictures again."""
    keep_pictures: Annotated[int, Field(ge=0)] | None = None
    """Images, first ids first, whose reconstructions stay once their point is scored (none: all)."""


class ScoreConfig(Section):
    """Pictures and features that were made elsewhere, for `nd score`."""

    originals: Path | None = None
    """Pictures that were seen: a folder of image files, or an array (npy, npz, pt)."""
    reconstructions: Path | None = None
    """Pictures of the same names: NAME.png, or several of an image: NAME_0.png, NAME/0.png; or an array."""
    method: str = "given pictures"
    """What tables call them."""
    brain_features: Path | None = None
    """Features decoded from the brain for retrieval, an image a row (npy, npz, pt)."""
    image_features: Path | None = None
    """Features of the originals that they are compared with."""


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
    axes: dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]] = Field(default_factory=dict)
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
    halving: bool = False
    """Try all points on a quarter of these images, the better half of them on half, and half of those on all: points
    that are clearly worse stop early."""
    report: Literal["grid", "chosen"] = "grid"
    """Test images are reconstructed at every point, or at the chosen one (and without guidance) only."""

    def all_axes(self) -> dict[str, tuple[Scalar, ...]]:
        """Return every axis but kappa and eta: configuration key -> values."""
        named: dict[str, tuple[Scalar, ...]] = {"sampler.sag_scale": self.sag, "seed": self.seed}
        return {**{key: values for key, values in named.items() if values}, **self.axes}
