"""What the tasks of one rank share: the job, fingerprints, and networks that are loaded on first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nd_dist.evaluation.job import Fingerprints, Job
from nd_dist.evaluation.points.units import Bundle, Point, image_name
from nd_dist.evaluation.reconstruction.controls import ShuffledTargets, shuffled_images
from nd_dist.evaluation.reconstruction.costs import StepCost, cost_class
from nd_dist.evaluation.reconstruction.decode import ImageTargets, StoredTargets, TrueTargets
from nd_dist.evaluation.reconstruction.networks import Sampler
from nd_dist.evaluation.scoring.judging import Judges
from nd_dist.evaluation.scoring.kinds import SEEN, Kinds
from nd_dist.fanout.results import has_result
from nd_dist.metrics.scores import Statistics


@dataclass
class Bench:
    """One rank's workplace.

    Args:
        job: What is evaluated.
        prints: Fingerprints agreed on by all ranks.
        costs: Cost class -> seconds per step, once measured.
    """

    job: Job
    prints: Fingerprints
    costs: Mapping[str, StepCost] = field(default_factory=dict)
    _seen: set[tuple[Path, str]] = field(default_factory=set)

    def sampler(self, point: Point) -> Sampler:
        """Return the guided sampler of a point's settings."""
        return self.job.networks.sampler(self.job.config_at(point))

    @cached_property
    def judges(self) -> Judges:
        """The metric networks."""
        return Judges(self.job.networks.judges(), self.job.networks.pair_judges())

    @cached_property
    def kinds(self) -> Kinds:
        """Probes for the classes of pictures; the judge that is read is the last one of two-way identification."""
        judges = [judge for judge in self.judges.features if judge.score == "two_way"]
        judge = judges[-1] if judges and SEEN not in self.job.absent else None
        job = self.job
        return Kinds(job.image_classes, job.source, judge, job.protocol, job.training_images)

    @property
    def statistics(self) -> Statistics:
        """How intervals are made."""
        return Statistics(self.job.config.evaluation.bootstrap)

    @property
    def summed_repeats(self) -> int:
        """How many repeats the wins of a point are summed over."""
        return self.job.config.evaluation.num_repeats if self.job.protocol.repeats == "mean_of_scores" else 1

    def cost_of(self, point: Point) -> StepCost:
        """Return seconds per step at a point; before anything is measured, relative costs."""
        return self.costs.get(cost_class(point), StepCost())

    def targets(self, point: Point, subject: int) -> ImageTargets:
        """Return the targets to reconstruct a subject's images from."""
        job = self.job
        targets: ImageTargets = TrueTargets(job.source)
        if job.is_decoded(point):
            targets = StoredTargets(job.layout.decoded(point, subject), job.split_images(subject))
        if point.control == "shuffled":
            targets = ShuffledTargets(targets, shuffled_images(job.images(subject), job.config.seed))
        return targets

    def has(self, folder: Path, fingerprint: str) -> bool:
        """Return whether a result is there; a result that was seen once is not looked for again."""
        key = (folder, fingerprint)
        if key not in self._seen and has_result(folder, fingerprint):
            self._seen.add(key)
        return key in self._seen

    def missing(self, bundle: Bundle, image_id: int) -> list[Point]:
        """Return the points of a bundle at which an image is not judged yet."""
        layout, prints, subject = self.job.layout, self.prints, bundle.subject
        return [
            point
            for point in bundle.points
            if not self.has(layout.judged(point, subject) / image_name(image_id), prints.judged(point, subject))
        ]

    def unmade(self, bundle: Bundle, image_id: int) -> list[Point]:
        """Return the points of a bundle at which an image's pictures are still to be made."""
        layout, prints, subject = self.job.layout, self.prints, bundle.subject
        return [
            point
            for point in bundle.points
            if not self.has(layout.pictures_of(point, subject, image_id), prints.pictures(point, subject))
        ]

    def score_folders(self, point: Point, subject: int) -> list[Path]:
        """Return where the scores of a point and subject lie: of its pictures, of retrieval where it is decoded."""
        folders = self.job.layout.score_folders(point, subject)
        return folders if self.job.is_decoded(point) or self.job.has_given_features else folders[:1]
