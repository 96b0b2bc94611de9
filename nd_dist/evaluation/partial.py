"""What a run that is not finished holds: metrics of every point on the images that all points have by now."""

from __future__ import annotations

from typing import Any

from nd_dist.config import Config
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import (
    Point,
    config_points,
    control_points,
    distinct_points,
    grid_points,
    image_name,
    recipe_point,
)
from nd_dist.evaluation.result import entry_key, metrics_content
from nd_dist.evaluation.scoring.score import JudgedImages, score_images
from nd_dist.fanout.results import RECORD
from nd_dist.frozen.judges import Score
from nd_dist.metrics.protocols import protocol_named
from nd_dist.metrics.scores import Scores, Statistics, kept_arrays, scored_arrays
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
        judged = {point: _judged(layout, point, subject) for point in points}
        begun = {point: ids for point, ids in judged.items() if ids}
        shared = sorted(set.intersection(*begun.values())) if begun else []
        if not shared:
            continue
        images[str(subject)] = shared
        for point in begun:
            found = _scores(layout, point, subject, shared, config, statistics)
            folder = str(layout.pictures(point, subject).relative_to(layout.run_dir))
            entries.append({**point.describe(), "subject": subject, "folder": folder, "metrics": found.metrics})
            scores[subject, point] = found
    if not entries:
        raise DataError("No image is judged at all points yet.", where=str(layout.run_dir))
    text = f"{len({Point.of(entry) for entry in entries})} of {len(points)} points begun, " + ", ".join(
        f"{len(ids)} images of subject {subject} at all of them" for subject, ids in images.items()
    )
    facts: dict[str, Any] = {
        "partial": text,
        "protocol": protocol.name,
        "protocol_details": protocol.describe(),
        "images": images,
    }
    facts["provenance"] = provenance(config)
    names = {name for entry in entries for name in entry["metrics"]}
    facts["simulated"] = any(METRICS[name].stands_for for name in names)  # only a made-up world has such judges
    return metrics_content(facts, sorted(entries, key=entry_key), scores, recipe_point(config), statistics)


def _judged(layout: Layout, point: Point, subject: int) -> set[int]:
    """Return the images that are judged at a point."""
    folders = layout.judged(point, subject).glob(f"image-*/{RECORD}")
    return {int(path.parent.name.partition("-")[2]) for path in folders}


def _score_of(name: str) -> Score:
    """Return the comparison that a judge's features are for."""
    return "two_way" if METRICS[name].chance == CHANCE_OF_TWO else "distance"


def _scores(
    layout: Layout, point: Point, subject: int, image_ids: list[int], config: Config, statistics: Statistics
) -> Scores:
    """Return the scores of some images of a point."""
    protocol, num_repeats = protocol_named(layout.protocol), config.evaluation.num_repeats
    judged = JudgedImages(
        [layout.judged(point, subject) / image_name(image_id) for image_id in image_ids],
        [layout.judged_originals / image_name(image_id) for image_id in image_ids],
        num_repeats,
    )
    judges = {name: _score_of(name) for name in judged.judges if name in METRICS}
    summed = num_repeats if protocol.repeats == "mean_of_scores" else 1
    scored = scored_arrays(dict(score_images(judged, judges, protocol)), summed, protocol.distractors, statistics)
    arrays = {key: array.numpy() for key, array in kept_arrays(scored).items()}
    return Scores({name: item.as_json() for name, item in scored.items()}, tuple(image_ids), arrays)
