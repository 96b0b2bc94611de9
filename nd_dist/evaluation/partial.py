"""What a run that is not finished holds: metrics of every point on the images that all points have by now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_dist.checkpoint import read_tensors
from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import ARRAYS, Layout
from nd_dist.evaluation.points.units import (
    Point,
    config_points,
    control_points,
    distinct_points,
    grid_points,
    recipe_point,
)
from nd_dist.evaluation.result import entry_key, metrics_content
from nd_dist.evaluation.scoring.groups import of_images
from nd_dist.evaluation.scoring.score import JudgedImages, JudgedSheets, score_images
from nd_dist.fanout.results import RECORD, read_record
from nd_dist.frozen.judges import Score
from nd_dist.metrics.protocols import protocol_named
from nd_dist.metrics.statistics.scores import Scores, Statistics, kept_arrays, scored_arrays
from nd_dist.metrics.table import METRICS
from nd_dist.provenance import provenance

CHANCE_OF_TWO = 0.5


def partial_metrics(config: Config) -> dict[str, Any]:
    """Return the content of a metrics.json of what is judged by now.

    Points that have no image yet are left out; of the others the images count that every one of them has, so that
    they compare. Nothing is written.

    Raises:
        DataError: no image is judged at all points that were begun.
    """
    protocol, statistics = protocol_named(config.evaluation.protocol), Statistics(config.evaluation.bootstrap)
    layout = Layout(config.run_dir, protocol.name)
    points = distinct_points((*config_points(config), *grid_points(config), *control_points(config)))
    entries, scores, images = [], {}, {}
    for subject in sorted(config.evaluated_subjects):
        every = [_Begun(layout, point, subject, config.evaluation.num_repeats) for point in points]
        begun = [each for each in every if each.image_ids]
        shared = sorted(set.intersection(*(set(each.image_ids) for each in begun))) if begun else []
        if not shared:
            continue
        images[str(subject)] = shared
        for each in begun:
            scores[subject, each.point] = found = each.scores(shared, statistics)
            folder = str(layout.pictures(each.point, subject).relative_to(layout.run_dir))
            entries.append({**each.point.describe(), "subject": subject, "folder": folder, "metrics": found.metrics})
    if not entries:
        raise DataError("No image is judged at all points yet.", where=str(layout.run_dir))
    text = f"{len({Point.of(entry) for entry in entries})} of {len(points)} points begun, " + ", ".join(
        f"{len(ids)} images of subject {subject} at all of them" for subject, ids in images.items()
    )
    names = {name for entry in entries for name in entry["metrics"]}
    facts: dict[str, Any] = {
        "partial": text,
        "protocol": protocol.name,
        "protocol_details": protocol.describe(),
        "images": images,
        "provenance": provenance(config),
        "simulated": any(METRICS[name].stands_for for name in names),  # only a made-up world has such judges
    }
    return metrics_content(facts, sorted(entries, key=entry_key), scores, recipe_point(config), statistics)


@dataclass(frozen=True)
class _Begun:
    """What is on disk of a point and subject."""

    layout: Layout
    point: Point
    subject: int
    num_repeats: int

    @property
    def image_ids(self) -> list[int]:
        """Images that are judged."""
        scored = read_record(self.layout.score(self.point, self.subject))
        records = [scored] if scored else [read_record(folder) for folder in self._sheets.folders]
        return [image_id for record in records for image_id in record["image_ids"]]

    @property
    def _sheets(self) -> JudgedSheets:
        return _sheets(self.layout.judged(self.point, self.subject))

    def scores(self, image_ids: list[int], statistics: Statistics) -> Scores:
        """Return the scores of some of them."""
        protocol, score = protocol_named(self.layout.protocol), self.layout.score(self.point, self.subject)
        if scored_ids := read_record(score).get("image_ids"):
            arrays = of_images(read_tensors(score / ARRAYS), scored_ids, image_ids)
        else:
            originals = _sheets(self.layout.judged_originals)
            judged = JudgedImages(self._sheets, originals, image_ids, self.num_repeats)
            judges = {name: _score_of(name) for name in self._sheets.judges if name in METRICS}
            arrays = dict(score_images(judged, judges, protocol))
        summed = self.num_repeats if protocol.repeats == "mean_of_scores" else 1
        scored = scored_arrays(arrays, summed, protocol.distractors, statistics)
        kept = {key: array.numpy() for key, array in kept_arrays(scored).items()}
        return Scores({name: item.as_json() for name, item in scored.items()}, tuple(image_ids), kept)


def _sheets(folder: Path) -> JudgedSheets:
    return JudgedSheets([path.parent for path in sorted(folder.glob(f"images-*/{RECORD}"))])


def _score_of(name: str) -> Score:
    """Return the comparison that a judge's features are for."""
    return "two_way" if METRICS[name].chance == CHANCE_OF_TWO else "distance"
