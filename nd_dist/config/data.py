"""Sections about data: the phantom, what is packed, the frozen networks that make targets, shards on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from nd_dist.config.base import Dtype, Fraction, Positive, Section, SubjectId
from nd_dist.location import parse_location
from nd_dist.schema import TARGETS

OWN_SPLIT = "own"


class PhantomConfig(Section):
    """The made-up data set that `nd phantom` writes (counts of NSD: 8 subjects, 40 sessions of 750 trials)."""

    layout: Literal["nsd", "laion-fmri"] = "nsd"
    """Whose file formats and folders: NSD's, or LAION-fMRI's."""
    num_subjects: Positive = 4
    """Subjects (laion-fmri: at most five); each has its own number of voxels and its own brain grid."""
    num_sessions: Annotated[int, Field(ge=2)] = 9
    """Sessions of a complete subject; the last subject but one misses some."""
    trials_per_session: Annotated[int, Field(ge=10)] = 80
    """Trials in a session (laion-fmri: about); each image is shown three times (laion-fmri: shared ones six times)."""
    num_shared: Positive = 24
    """Test images, seen by every subject."""
    num_voxels: Annotated[int, Field(ge=50)] = 400
    """About how many voxels the ROI of a subject has (subjects differ)."""
    noise_ceiling: Fraction = 0.5
    """Share of a good voxel's single-trial variance that the picture explains."""


class DataConfig(Section):
    """What is packed from a data set, and how."""

    reader: Annotated[str, Field(pattern=r"^(nsd|mindeye2|laion_fmri|[\w.]+:\w+)$")] = "nsd"
    """Layout of `nsd_root`: NSD's own files (nsd), MindEye2's published ones (mindeye2), LAION-fMRI's (laion_fmri), or
    one that a class of yours reads, `package.module:Class` (docs/own-data.md)."""
    betas: str = "betas_fithrf_GLMdenoise_RR"
    """Version of the single-trial betas (folder name)."""
    betas_format: Literal["auto", "nifti", "hdf5"] = "auto"
    """File format of the betas; auto takes HDF5 where both exist (it reads by session chunk)."""
    roi: str = "nsdgeneral"
    """Name of the ROI volume whose positive labels select the voxels; laion_fmri: a ROI, a category of them, `all`, or
    several joined by `+`."""
    min_noise_ceiling: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Take only voxels of the ROI whose noise ceiling (percent; NSD: of the mean of three trials, LAION-fMRI: of
    twelve) is at least this."""
    subjects: tuple[SubjectId, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Subjects to pack and to train on."""
    split: str = OWN_SPLIT
    """Which images are trained on and which tested: the data set's own test set (own; of NSD the images that all
    subjects share), or a split that it names (LAION-fMRI: tau, ood, cluster_k5_0 ..). Chosen when shards are read, not
    when they are packed; what is tested for one of `data.subjects` is trained on for none."""
    max_sessions: Positive | None = None
    """Take training trials of the first sessions of every subject only (1 = the "1 hour" setting); none takes all.
    Test trials stay complete."""
    max_test_sessions: Positive | None = None
    """Take test trials of the first sessions only (37, with max_sessions: the early release); the result says so."""
    accept: tuple[Literal["constant-trials", "equal-trials", "constant-voxels", "constant-pictures"], ...] = ()
    """Keep what cannot be real data (a copy that broke off, a file delivered twice) instead of refusing it; the index
    names each."""
    normalization: Literal["session-train", "mindeye1", "mindeye2", "brain-diffuser"] = "session-train"
    """Z-scoring: per session without the test images (session-train, and mindeye2 as its paper says), per session with
    all trials (mindeye1, and the notebook that MindEye2 published), or once over all sessions by the training images'
    mean over their trials (brain-diffuser)."""
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
        if self.max_test_sessions is not None and self.max_test_sessions < (self.max_sessions or 10**9):
            raise ValueError("max_test_sessions needs a max_sessions that is not larger: those are packed whole")
        return self


class FrozenConfig(Section):
    """How the frozen networks turn pictures and captions into targets, and pictures into guidance features."""

    vae_encode: Literal["mode", "sample"] = "mode"
    """z from the mode of the VAE's posterior, or a sample of it (as the released targets were made)."""
    normalize: Literal["imagenet", "clip"] = "imagenet"
    """Pixel statistics before the guidance CLIP (the released code uses ImageNet's with CLIP)."""
    antialias: bool = False
    """Antialiased resize before the guidance CLIP (torchvision's tensor default: off up to 0.16, on from 0.17)."""
    guidance_layers: tuple[str, ...] = ()
    """Modules of another guidance network (any vision tower of transformers) whose outputs are the guidance targets
    g02, g04 .. in this order, six at most; none: the MLP outputs of the first six blocks of a CLIP."""
    batch_size: Positive = 32
    """Pictures per forward pass when targets are extracted."""
    dtype: Dtype = "float32"
    """Computation dtype of the frozen networks."""


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
