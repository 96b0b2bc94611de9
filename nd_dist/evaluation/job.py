"""What is evaluated, and the keys that say which results on disk belong to it. Computes no result."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nd_dist.config import Config
from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.evaluation.points.axes import config_at, decoding_settings
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Bundle, Point, plan_bundles
from nd_dist.evaluation.reconstruction.networks import Networks, guidance_settings
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.evaluation.scoring.groups import Groups
from nd_dist.fanout.leases import STALE_S
from nd_dist.fanout.results import OUTDATED, SETTINGS
from nd_dist.files import hash_json, read_json
from nd_dist.metrics.protocols import Protocol, protocol_named
from nd_dist.metrics.table import METRICS, added_metrics
from nd_dist.schema import Split
from nd_dist.seeds import unit_seed

FORMAT = 1
JUDGING_FORMAT = 2
STATISTICS_FORMAT = 4
SELECTION = "selection"
# how the sampler runs, but not what it makes: in the settings of pictures they stand as they are by default
IMMATERIAL = {"max_rows": None, "checkpointing": "auto", "on_non_finite": "stop"}
PLAIN = Point(0.0, 0.0)  # without guidance, at the recipe's settings

Stage = Literal["run", "originals", "judged_originals", "decoded", "pictures", "judged", "score", "retrieval"]


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
        subject_names: Subject -> the data set's own name of it, where that says more than the number.
        departures: What these data are otherwise than the published ones, one sentence each.
        has_given_features: Whether the source brings features for retrieval.
        round_images: Images of an early round of a search, whose scores lie apart; 0: it is none.
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
    subject_names: Mapping[int, str] = field(default_factory=dict)
    departures: tuple[str, ...] = ()
    has_given_features: bool = False
    round_images: int = 0

    @property
    def protocol(self) -> Protocol:
        """The metric protocol."""
        return protocol_named(self.config.evaluation.protocol)

    @property
    def layout(self) -> Layout:
        """Where files go; training images, which only serve to choose a point, never mix with test images."""
        root = self.config.run_dir / SELECTION if self.split == "train" else self.config.run_dir
        return Layout(root, self.config.evaluation.protocol, self.round_images)

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
        return ids if self.split == "test" else sorted(_drawn(ids)[: self.config.sweep.num_images])

    def images(self, subject: int) -> tuple[int, ...]:
        """Return the images that are reconstructed: of test images those that the recipe names, or the first.

        Raises:
            ConfigError: one that the recipe names is none.
        """
        found, evaluation = self.split_images(subject), self.config.evaluation
        if self.split == "train":
            return tuple(sorted(_drawn(found)[: self.round_images or None]))
        if unknown := sorted(set(evaluation.image_ids or ()) - set(found)):
            raise ConfigError(
                f"Images are no test images of subject {subject}.",
                where="evaluation.image_ids",
                expected=f"some of {len(found)} ids, {found[0]} to {found[-1]}",
                found=", ".join(map(str, unknown)),
            )
        return tuple(sorted(evaluation.image_ids or found))[: evaluation.num_images]

    def all_images(self) -> tuple[int, ...]:
        """Return the images of all subjects, ascending, each once; for every round of a search the same."""
        images = self.images if self.split == "test" else self.split_images
        return tuple(sorted({image_id for subject in self.subjects for image_id in images(subject)}))

    def bundles(self) -> list[Bundle]:
        """Return the bundles of units that ranks claim."""
        images = {subject: self.images(subject) for subject in self.subjects}
        return plan_bundles(self.points, images, self.config.evaluation.batch_size)

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


def _drawn(image_ids: Sequence[int]) -> list[int]:
    """Return training images in the order in which they are drawn."""
    return sorted(image_ids, key=lambda image_id: unit_seed(0, "selection", image_id))


@dataclass(frozen=True)
class Keys:
    """Which results on disk are this job's: what determines them, and their hash. Made on one rank, given to all.

    Args:
        pictures: Variant of a point -> JSON settings that determine its pictures, kappa, eta and subject aside; ``""``
            has the recipe's own.
        judging: JSON settings that determine metrics of pictures.
        statistics: JSON settings that determine intervals.
        images: Subject -> hash of its images.
        num_repeats: Reconstructions of an image that count.
        begun: (point, subject) -> repeats with which its pictures were begun, where more are wanted now.
        absent: What cannot be computed -> why.
    """

    pictures: Mapping[str, Mapping[str, Any]]
    judging: Mapping[str, Any]
    statistics: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[int, str] = field(default_factory=dict)
    num_repeats: int = 1
    begun: Mapping[tuple[Point, int], int] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> Mapping[str, Any]:
        """Settings that determine the pictures of the recipe's own points."""
        return self.pictures[""]

    def settings(self, point: Point, subject: int) -> dict[str, Any]:
        """Return the settings that determine the pictures of a point and subject."""
        guidance = {"kappa": point.kappa, "eta": point.eta} if point.is_guided else {}
        settings = {**self.pictures.get(variant_name(point), self.own), "subject": subject, "guidance": guidance}
        return {**settings, "num_repeats": self.begun.get((point, subject), self.num_repeats)}

    def key(self, stage: Stage, point: Point = PLAIN, subject: int = 0) -> str:
        """Return the hash of all that determines what a stage makes of a point and subject.

        ``run`` is everything but points and images: results that may stand in one metrics file.
        """
        settings = self.settings(point, subject)
        is_more = settings["num_repeats"] != self.num_repeats
        inputs: Any  # JSON
        match stage:
            case "run":
                inputs = [{**self.own, "num_repeats": self.num_repeats}, self.judging, self.statistics]
            case "originals":
                inputs = self.own["shards"]
            case "judged_originals":
                inputs = [self.key("originals"), self.judging]
            case "decoded":
                inputs = {"subject": subject, "decoding": settings["decoding"], "shards": settings["shards"]}
            case "pictures":
                inputs = settings
            case "judged":
                pictures = self.key("pictures", point, subject)
                inputs = [pictures, self.judging, *([self.num_repeats] if is_more else [])]
            case "score":
                inputs = [self.key("judged", point, subject), self.statistics, self.images[subject]]
            case "retrieval":
                inputs = [self.key("decoded", point, subject), self.statistics, self.images[subject]]
        return hash_json(inputs)


def variant_name(point: Point) -> str:
    """Return the name of what sets a point apart from others, kappa and eta aside; empty for a plain point."""
    plain = not point.settings and point.control == "none"
    return "" if plain else Point(0.0, 0.0, point.settings, point.control).name


def keys_of(job: Job) -> Keys:
    """Return the keys of a job; hashes model folders and looks at what is on disk, so call it on one rank."""
    evaluation, networks = job.config.evaluation, job.networks
    pictures = {"": _settings(job, PLAIN)}
    for point in (*job.points, *job.decodings()):
        if (name := variant_name(point)) not in pictures:
            pictures[name] = _settings(job, point)
    pairs = {judge.name: judge.identity for judge in networks.pair_judges()}
    keys = Keys(
        pictures=pictures,
        judging={
            "format": JUDGING_FORMAT,
            "protocol": job.protocol.settings(),
            "judges": {judge.name: judge.identity for judge in networks.judges()},
            **({"pair_judges": pairs} if pairs else {}),
            **({"metrics": added} if (added := added_metrics()) else {}),
        },
        statistics={
            "format": STATISTICS_FORMAT,
            "bootstrap": evaluation.bootstrap,
            **({"image_groups": hash_json(job.image_groups)} if job.image_groups else {}),
            **({"image_classes": hash_json(_kinds(job))} if job.image_classes else {}),
        },
        images={subject: hash_json(job.images(subject)) for subject in job.subjects},
        num_repeats=evaluation.num_repeats,
        absent={**job.absent, **networks.absent()},
    )
    return replace(keys, begun=_begun(job, keys))


def _kinds(job: Job) -> list[object]:
    """Return what metrics of the kind of thing follow from."""
    return [job.image_classes, job.training_images, METRICS["kind_seen"].version]


def _begun(job: Job, keys: Keys) -> dict[tuple[Point, int], int]:
    """Return with how many repeats pictures were begun whose settings are this job's otherwise."""
    found: dict[tuple[Point, int], int] = {}
    for point, subject in itertools.product(job.points, job.subjects):
        folder = job.layout.pictures(point, subject)
        for path in (folder / SETTINGS, *(folder.parent / OUTDATED).glob(f"{folder.name}-*/{SETTINGS}")):
            content = read_json(path) if path.exists() else {}
            num_repeats = content.get("settings", {}).get("num_repeats", keys.num_repeats)
            if num_repeats != keys.num_repeats:
                begun = {(point, subject): num_repeats}
                if replace(keys, begun=begun).key("pictures", point, subject) == content["fingerprint"]:
                    found |= begun
    return found


def _settings(job: Job, point: Point) -> dict[str, Any]:
    """Return the settings that determine pictures, apart from kappa, eta and subject."""
    config = job.config_at(point)
    settings = {
        "format": FORMAT,
        "seed": config.seed,
        "sampler": {**config.sampler.model_dump(mode="json", exclude={"kappa", "eta", "guidance"}), **IMMATERIAL},
        "guidance_input": {
            "antialias": config.frozen.antialias,
            "normalize": config.frozen.normalize,
            **guidance_settings(config),
        },
        "networks": job.networks.identity(config),
        "shards": job.content_id or job.source.index.id,
        "decoding": _decoding(job, point),
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
