"""What is evaluated, and the fingerprints that say which results on disk belong to it. Computes no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.evaluation.points.axes import config_at, decoding_settings
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Bundle, Point, plan_bundles
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.evaluation.scoring.groups import Groups
from nd_dist.fanout.leases import STALE_S
from nd_dist.files import hash_json, read_json
from nd_dist.metrics.protocols import Protocol, protocol_named
from nd_dist.schema import Split
from nd_dist.seeds import unit_seed

FORMAT = 1
JUDGING_FORMAT = 2
STATISTICS_FORMAT = 3
SELECTION = "selection"


@dataclass(frozen=True)
class Job:
    """One evaluation.

    Args:
        config: The recipe.
        points: Points to reconstruct at, controls included.
        source: Voxels, targets and pictures.
        decoder_dir: Folder of the trained decoder; not looked at with ``embeddings=ground_truth``.
        networks: The frozen networks.
        ridge_dir: Folder of the ridge regression that the control ``ridge`` decodes with.
        split: Whose images: ``test`` for reporting, ``train`` for choosing a guidance point.
        stale_s: Seconds without a sign of life after which a rank's work is taken over.
        heldout: Subject -> training images that the decoder was not trained on, for split ``train``; a subject that is
            missing left none out.
        absent: What cannot be computed here -> why (controls without training pictures, say).
        selection: How a point was chosen on training images, for the record; empty where none was.
        image_groups: Named groups of test images whose metrics are reported apart as well.
        image_classes: Named classes of images, training images too, of which it is asked how much is decoded.
        training_images: Training images of all subjects, from which classes are learnt; none: each subject's own.
        content_id: Hash of what is read of the source; empty: the source's own.
        is_simulated: Whether the data are made up, as the source states; None: it does not say.
        departures: What these data are otherwise than the published ones, one sentence each.
        has_given_features: Whether the source brings features for retrieval.
    """

    config: Config
    points: tuple[Point, ...]
    source: Source
    decoder_dir: Path
    networks: Networks
    ridge_dir: Path = Path()
    split: Split = "test"
    stale_s: float = STALE_S
    heldout: Mapping[int, Sequence[int]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)
    image_groups: Groups = field(default_factory=dict)
    image_classes: Groups = field(default_factory=dict)
    training_images: tuple[int, ...] = ()
    content_id: str = ""
    is_simulated: bool | None = None
    departures: tuple[str, ...] = ()
    has_given_features: bool = False

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
        """Return a subject's images that are decoded together: all test images, or the training images of a sweep.

        Raises:
            DataError: there is none.
        """
        heldout = self.heldout.get(subject, ()) if self.split == "train" else ()
        ids = sorted(heldout or self.source.images(subject, self.split))
        if not ids:
            raise DataError(f"Subject {subject} has no {self.split} images.", todo="run `nd verify` on the shards")
        if self.split == "test":
            return ids
        drawn = sorted(ids, key=lambda image_id: unit_seed(0, "selection", image_id))
        return sorted(drawn[: self.config.sweep.num_images])

    def images(self, subject: int) -> tuple[int, ...]:
        """Return the images that are reconstructed: of test images the first ``evaluation.num_images``."""
        limit = self.config.evaluation.num_images if self.split == "test" else None
        return tuple(self.split_images(subject)[:limit])

    def all_images(self) -> tuple[int, ...]:
        """Return the images of all subjects, ascending, each once."""
        return tuple(sorted({image_id for subject in self.subjects for image_id in self.images(subject)}))

    def bundles(self) -> list[Bundle]:
        """Return the bundles of units that ranks claim."""
        images = {subject: self.images(subject) for subject in self.subjects}
        evaluation = self.config.evaluation
        return plan_bundles(self.points, images, evaluation.batch_size, evaluation.num_repeats)

    def config_at(self, point: Point) -> Config:
        """Return the recipe as it is at a point."""
        return config_at(self.config, point)

    def is_decoded(self, point: Point) -> bool:
        """Return whether a point's targets come from the decoder (otherwise they are the pictures' own)."""
        return self.config_at(point).evaluation.embeddings == "decoded"

    def decodings(self) -> list[Point]:
        """Return what has to be decoded, each once: points reduced to the settings that matter for it."""
        return list(dict.fromkeys(decoding_settings(point) for point in self.points if self.is_decoded(point)))

    def decoder_of(self, point: Point) -> Path:
        """Return the folder of the decoder that a point's targets come from."""
        return self.ridge_dir if point.control == "ridge" else self.decoder_dir

    def z_calibration(self, point: Point) -> str:
        """Return how z is calibrated; a few training images are no statistic, so there it is the whole training's."""
        rule = self.config_at(point).evaluation.z_calibration
        return "stored" if self.split == "train" and rule == "test_set" else rule


@dataclass(frozen=True)
class Fingerprints:
    """Which results on disk are this job's. Made on one rank, given to all.

    Args:
        settings: JSON settings that determine the pictures at the recipe's own settings, apart from point and subject.
        judging: JSON settings that determine metrics of pictures.
        statistics: JSON settings that determine intervals.
        variants: Point name -> settings, for points with settings of their own and controls.
        images: Subject -> hash of its images.
        absent: What cannot be computed -> why.
    """

    settings: Mapping[str, Any]
    judging: Mapping[str, Any]
    statistics: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: Mapping[int, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Fingerprint of everything but points and images: results that may stand in one metrics file."""
        return hash_json([self.settings, self.judging, self.statistics])

    @property
    def originals(self) -> str:
        """Fingerprint of the stored originals."""
        return hash_json(self.settings["shards"])

    @property
    def judged_originals(self) -> str:
        """Fingerprint of the originals' features."""
        return hash_json([self.originals, self.judging])

    def decoded(self, point: Point, subject: int) -> str:
        """Fingerprint of a subject's predictions."""
        settings = self._settings_of(point)
        return hash_json({"subject": subject, "decoding": settings["decoding"], "shards": settings["shards"]})

    def point_settings(self, point: Point, subject: int) -> dict[str, Any]:
        """Return the settings that determine the pictures of a point and subject."""
        guidance = {"kappa": point.kappa, "eta": point.eta} if point.is_guided else {}
        return {**self._settings_of(point), "subject": subject, "guidance": guidance}

    def pictures(self, point: Point, subject: int) -> str:
        """Fingerprint of the pictures of a point and subject."""
        return hash_json(self.point_settings(point, subject))

    def judged(self, point: Point, subject: int) -> str:
        """Fingerprint of the metrics and features of single images."""
        return hash_json([self.pictures(point, subject), self.judging])

    def score(self, point: Point, subject: int) -> str:
        """Fingerprint of the scores of a point and subject."""
        return hash_json([self.judged(point, subject), self.statistics, self.images[subject]])

    def retrieval(self, point: Point, subject: int) -> str:
        """Fingerprint of the retrieval scores of a subject."""
        return hash_json([self.decoded(point, subject), self.statistics, self.images[subject]])

    def _settings_of(self, point: Point) -> Mapping[str, Any]:
        return self.variants.get(variant_name(point), self.settings)


def variant_name(point: Point) -> str:
    """Return the name of what sets a point apart from others, kappa and eta aside; empty for a plain point."""
    plain = not point.settings and point.control == "none"
    return "" if plain else Point(0.0, 0.0, point.settings, point.control).name


def fingerprints(job: Job) -> Fingerprints:
    """Return the fingerprints of a job; hashes model folders, so call it on one rank."""
    evaluation = job.config.evaluation
    judges = job.networks.judges()
    judging = {
        "format": JUDGING_FORMAT,
        "protocol": job.protocol.settings(),
        "judges": {judge.name: judge.identity for judge in judges},
        **({"pair_judges": pairs} if (pairs := _identities(job.networks.pair_judges())) else {}),
    }
    variants: dict[str, dict[str, Any]] = {}
    for point in (*job.points, *job.decodings()):
        if name := variant_name(point):
            variants.setdefault(name, _settings(job, point))
    return Fingerprints(
        settings=_settings(job, Point(0.0, 0.0)),
        judging=judging,
        statistics={
            "format": STATISTICS_FORMAT,
            "bootstrap": evaluation.bootstrap,
            **({"image_groups": hash_json(job.image_groups)} if job.image_groups else {}),
            **({"image_classes": hash_json([job.image_classes, job.training_images])} if job.image_classes else {}),
        },
        variants=variants,
        images={subject: hash_json(job.images(subject)) for subject in job.subjects},
        absent={**job.absent, **job.networks.absent()},
    )


def _identities(judges: Any) -> dict[str, str]:
    return {judge.name: judge.identity for judge in judges}


def _settings(job: Job, point: Point) -> dict[str, Any]:
    """Return the settings that determine pictures, apart from kappa, eta and subject."""
    config = job.config_at(point)
    settings = {
        "format": FORMAT,
        "seed": config.seed,
        "sampler": config.sampler.model_dump(mode="json", exclude={"kappa", "eta"}),
        "guidance_input": {"antialias": config.frozen.antialias, "normalize": config.frozen.normalize},
        "networks": job.networks.identity(config),
        "shards": job.content_id or job.source.index.id,
        "decoding": _decoding(job, point),
        "num_repeats": config.evaluation.num_repeats,
    }
    return settings if point.control == "none" else {**settings, "control": point.control}


def _decoding(job: Job, point: Point) -> dict[str, Any]:
    """Return what determines the targets that are reconstructed from."""
    if not job.is_decoded(point):
        return {"embeddings": "ground_truth", "split": job.split}
    rule = job.z_calibration(point)
    if rule == "test_set" and min(len(job.split_images(s)) for s in job.subjects) < 2:
        raise ConfigError(
            "z cannot be calibrated on a single test image (its deviation is zero).",
            where="evaluation.z_calibration",
            expected="at least two images for test_set",
            todo="use evaluation.z_calibration=stored",
        )
    description = job.decoder_of(point) / "config.json"
    if not description.is_file():
        raise CheckpointError("There is no trained decoder.", where=str(description.parent), todo="run `nd train`")
    evaluation = job.config_at(point).evaluation
    calibrated = list(evaluation.calibrated)
    return {
        **({"calibrated": calibrated} if calibrated != ["initial"] else {}),
        **({"calibrated_by": evaluation.calibrated_by} if evaluation.calibrated_by != "element" else {}),
        "embeddings": "decoded",
        "decoder": hash_json(read_json(description)),
        "z_calibration": rule,
        "two_repeats": evaluation.two_repeats,
        "split": job.split,
        "seed": job.config_at(point).seed,
    }
