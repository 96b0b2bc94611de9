"""What is evaluated, and the fingerprints that say which results on disk belong to it. Computes no result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.evaluation.layout import Layout
from nd_dist.evaluation.leases import STALE_S
from nd_dist.evaluation.networks import Networks
from nd_dist.evaluation.source import Source
from nd_dist.evaluation.units import Group, Point, plan_groups
from nd_dist.files import hash_json, read_json
from nd_dist.metrics.protocols import Protocol, protocol_named
from nd_dist.schema import Split

FORMAT = 1
SELECTION = "selection"


@dataclass(frozen=True)
class Job:
    """One evaluation.

    Args:
        config: The recipe.
        points: Guidance points.
        source: Voxels, targets and pictures.
        decoder_dir: Folder of the trained decoder; not looked at with ``embeddings=ground_truth``.
        networks: The frozen networks.
        split: Whose images: ``test`` for reporting, ``train`` for choosing a guidance point.
        stale_s: Seconds without a sign of life after which a rank's work is taken over.
    """

    config: Config
    points: tuple[Point, ...]
    source: Source
    decoder_dir: Path
    networks: Networks
    split: Split = "test"
    stale_s: float = STALE_S

    @property
    def protocol(self) -> Protocol:
        """The metric protocol."""
        return protocol_named(self.config.evaluation.protocol)

    @property
    def layout(self) -> Layout:
        """Where files go; training images, which only serve to choose a point, never mix with test images."""
        root = self.config.run_dir / SELECTION if self.split == "train" else self.config.run_dir
        return Layout(root, self.config.evaluation.protocol)

    @property
    def subjects(self) -> tuple[int, ...]:
        """Subjects, ascending."""
        return tuple(sorted(self.config.evaluated_subjects))

    def split_images(self, subject: int) -> list[int]:
        """Return all of a subject's images of the split; they are decoded together.

        Raises:
            DataError: there is none.
        """
        ids = sorted(self.source.images(subject, self.split))
        if not ids:
            raise DataError(f"Subject {subject} has no {self.split} images.", todo="run `nd verify` on the shards")
        return ids

    def images(self, subject: int) -> tuple[int, ...]:
        """Return the images that are reconstructed: the first ``evaluation.num_images``."""
        return tuple(self.split_images(subject)[: self.config.evaluation.num_images])

    def all_images(self) -> tuple[int, ...]:
        """Return the images of all subjects, ascending, each once."""
        return tuple(sorted({image_id for subject in self.subjects for image_id in self.images(subject)}))

    def groups(self) -> list[Group]:
        """Return the groups of units that ranks claim."""
        images = {subject: self.images(subject) for subject in self.subjects}
        evaluation = self.config.evaluation
        return plan_groups(self.points, images, evaluation.batch_size, evaluation.num_repeats)


@dataclass(frozen=True)
class Fingerprints:
    """Which results on disk are this job's. Made on one rank, given to all.

    Args:
        settings: JSON settings that determine the pictures, apart from point and subject.
        judging: JSON settings that determine metrics of pictures.
        statistics: JSON settings that determine intervals.
    """

    settings: Mapping[str, Any]
    judging: Mapping[str, Any]
    statistics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Fingerprint of everything but the points: results that may stand in one metrics file."""
        return hash_json([self.settings, self.judging, self.statistics])

    @property
    def originals(self) -> str:
        """Fingerprint of the stored originals."""
        return hash_json(self.settings["shards"])

    @property
    def judged_originals(self) -> str:
        """Fingerprint of the originals' features."""
        return hash_json([self.originals, self.judging])

    def decoded(self, subject: int) -> str:
        """Fingerprint of a subject's predictions."""
        return hash_json(
            {"subject": subject, "decoding": self.settings["decoding"], "shards": self.settings["shards"]}
        )

    def point_settings(self, point: Point, subject: int) -> dict[str, Any]:
        """Return the settings that determine the pictures of a point and subject."""
        guidance = {"kappa": point.kappa, "eta": point.eta} if point.is_guided else {}
        return {**self.settings, "subject": subject, "guidance": guidance}

    def pictures(self, point: Point, subject: int) -> str:
        """Fingerprint of the pictures of a point and subject."""
        return hash_json(self.point_settings(point, subject))

    def judged(self, point: Point, subject: int) -> str:
        """Fingerprint of the metrics and features of single images."""
        return hash_json([self.pictures(point, subject), self.judging])

    def score(self, point: Point, subject: int) -> str:
        """Fingerprint of the scores of a point and subject."""
        return hash_json([self.judged(point, subject), self.statistics])

    def retrieval(self, subject: int) -> str:
        """Fingerprint of the retrieval scores of a subject."""
        return hash_json([self.decoded(subject), self.statistics])


def fingerprints(job: Job) -> Fingerprints:
    """Return the fingerprints of a job; hashes model folders, so call it on one rank."""
    config, evaluation = job.config, job.config.evaluation
    sampler = config.sampler.model_dump(mode="json", exclude={"kappa", "eta"})
    settings = {
        "format": FORMAT,
        "seed": config.seed,
        "sampler": sampler,
        "guidance_input": {"antialias": config.frozen.antialias, "normalize": config.frozen.normalize},
        "networks": job.networks.identity(),
        "shards": job.source.index.id,
        "decoding": _decoding(job),
        "num_repeats": evaluation.num_repeats,
    }
    judging = {
        "format": FORMAT,
        "protocol": job.protocol.settings(),
        "judges": {judge.name: judge.identity for judge in job.networks.judges()},
    }
    statistics = {
        "format": FORMAT,
        "bootstrap": evaluation.bootstrap,
        "seed": config.seed,
        "images": {str(subject): hash_json(job.images(subject)) for subject in job.subjects},
    }
    return Fingerprints(settings, judging, statistics)


def _decoding(job: Job) -> dict[str, Any]:
    """Return what determines the targets that are reconstructed from."""
    evaluation = job.config.evaluation
    if evaluation.embeddings == "ground_truth":
        return {"embeddings": "ground_truth", "split": job.split}
    if evaluation.z_calibration == "test_set" and min(len(job.split_images(s)) for s in job.subjects) < 2:
        raise ConfigError(
            "z cannot be calibrated on a single test image (its deviation is zero).",
            where="evaluation.z_calibration",
            expected="at least two images for test_set",
            todo="use evaluation.z_calibration=stored",
        )
    description = job.decoder_dir / "config.json"
    if not description.is_file():
        raise CheckpointError("There is no trained decoder.", where=str(job.decoder_dir), todo="run `nd train`")
    return {
        "embeddings": "decoded",
        "decoder": hash_json(read_json(description)),
        "z_calibration": evaluation.z_calibration,
        "split": job.split,
        "seed": job.config.seed,
    }
