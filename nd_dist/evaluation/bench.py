"""What the tasks of one rank share: the job, its keys, and networks that are loaded on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.evaluation.job import Job, Keys
from nd_dist.evaluation.points.units import Bundle, Point, sheet_name
from nd_dist.evaluation.reconstruction.controls import ShuffledTargets, shuffled_images
from nd_dist.evaluation.reconstruction.costs import StepCost, cost_class
from nd_dist.evaluation.reconstruction.decode import ImageTargets, StoredTargets, TrueTargets
from nd_dist.evaluation.scoring.judging import BATCH, Judges
from nd_dist.evaluation.scoring.kinds import SEEN, Kinds
from nd_dist.evaluation.scoring.score import JudgedSheets
from nd_dist.fanout.results import has_result, read_record
from nd_dist.files import hash_json
from nd_dist.frozen.judges import Judge
from nd_dist.metrics.statistics.scores import Statistics
from nd_dist.schema import GUIDANCE, SEMANTIC


@dataclass
class Bench:
    """One rank's workplace.

    Args:
        job: What is evaluated.
        keys: Keys of its results, agreed on by all ranks.
        costs: Cost class -> seconds per step, once measured.
    """

    job: Job
    keys: Keys
    costs: Mapping[str, StepCost] = field(default_factory=dict)
    _seen: set[tuple[Path, str]] = field(default_factory=set)

    def sampler(self, point: Point) -> GuidedSampler:
        """Return the guided sampler of a point's settings."""
        return self.job.networks.sampler(self.job.config_at(point))

    @cached_property
    def judges(self) -> Judges:
        """The metric networks."""
        networks = self.job.networks
        return Judges(networks.judges(), networks.pair_judges(), networks.device)

    @property
    def deepest_judge(self) -> Judge | None:
        """The last metric network of two-way identification: the most abstract."""
        return next((judge for judge in reversed(self.judges.features) if judge.score == "two_way"), None)

    @cached_property
    def kinds(self) -> Kinds:
        """Probes for the classes of pictures."""
        job, judge = self.job, self.deepest_judge if SEEN not in self.job.absent else None
        return Kinds(job.image_classes, job.source, judge, job.protocol, job.training_images)

    @property
    def statistics(self) -> Statistics:
        """How intervals are made."""
        return Statistics(self.job.config.evaluation.bootstrap)

    @property
    def summed_repeats(self) -> int:
        """How many repeats the wins of a point are summed over."""
        return self.keys.num_repeats if self.job.protocol.repeats == "mean_of_scores" else 1

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

    def compared_target(self, point: Point, subject: int) -> str:
        """Return what retrieval compares: the deepest guidance layer that is decoded, else the semantic target."""
        if not self.job.is_decoded(point):
            return GUIDANCE[-1]
        names = StoredTargets(self.job.layout.decoded(point, subject), self.job.split_images(subject)).names
        return next((name for name in reversed(GUIDANCE) if name in names), SEMANTIC)

    def has(self, folder: Path, key: str) -> bool:
        """Return whether a result is there; a result that was seen once is not looked for again."""
        if (folder, key) not in self._seen and has_result(folder, key):
            self._seen.add((folder, key))
        return (folder, key) in self._seen

    def has_score(self, point: Point, subject: int) -> bool:
        """Return whether a point and subject are scored."""
        return self.has(self.job.layout.score(point, subject), self.keys.key("score", point, subject))

    def sheet(self, bundle: Bundle, point: Point) -> tuple[Path, str]:
        """Return where the judgement of a bundle's images at a point lies, and its key."""
        folder = self.job.layout.judged(point, bundle.subject) / sheet_name(bundle.index)
        return folder, hash_json([self.keys.key("judged", point, bundle.subject), list(bundle.image_ids)])

    def missing(self, bundle: Bundle) -> list[Point]:
        """Return the points of a bundle that are neither scored nor judged."""
        return [
            point
            for point in bundle.points
            if not self.has_score(point, bundle.subject) and not self.has(*self.sheet(bundle, point))
        ]

    def repeats_made(self, point: Point, subject: int, image_id: int) -> int:
        """Return how many reconstructions of an image there are."""
        record = read_record(self.job.layout.pictures_of(point, subject, image_id))
        return len(record["files"]) if record.get("fingerprint") == self.keys.key("pictures", point, subject) else 0

    def original_sheets(self) -> list[tuple[Sequence[int], Path, str]]:
        """Return (image ids, where the judgement of what was seen lies, its key), a batch of the judges at a time."""
        ids, size = self.job.all_images(), BATCH.get(self.job.networks.device.type, BATCH["cpu"])
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        place, key = self.job.layout.judged_originals, self.keys.key("judged_originals")
        return [(ids, place / sheet_name(i), hash_json([key, list(ids)])) for i, ids in enumerate(chunks)]

    def judged_originals(self) -> JudgedSheets:
        """Return what was judged of the pictures that were seen."""
        return JudgedSheets([folder for _, folder, _ in self.original_sheets()])

    def score_folders(self, point: Point, subject: int) -> list[Path]:
        """Return where the scores of a point and subject lie: of its pictures, of retrieval where it is decoded."""
        folders = self.job.layout.score_folders(point, subject)
        return folders if self.job.is_decoded(point) or self.job.has_given_features else folders[:1]
