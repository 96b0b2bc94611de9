"""Join evaluated runs into one run folder: two sweeps, one run per subject, or runs of differently trained decoders.

Where the recipes of two runs differ in a setting that decides their numbers, it becomes part of the points, as an axis
of a sweep would. Pictures and scores are linked, not copied, where the file system allows it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_dist.config import Scalar
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import Layout
from nd_dist.evaluation.points.units import Point, image_name
from nd_dist.evaluation.result import FORMAT, entry_key, metrics_content
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.fanout.results import read_record
from nd_dist.files import canonical_json, read_json, write_json
from nd_dist.metrics.generalisation import KEY as GENERALISATION
from nd_dist.metrics.statistics.scores import Scores, Statistics

SAME = ("format", "protocol", "protocol_details", "split", "simulated", "judges", "bootstrap", "shards")
OF_NO_ACCOUNT = (
    "run_dir", "nsd_root", "shards_dir", "phantom", "launch", "sweep", "data", "sampler.kappa", "sampler.eta",
    "evaluation.subjects", "evaluation.baseline", "evaluation.controls", "evaluation.points", "evaluation.batch_size",
    "evaluation.num_images", "evaluation.image_ids", "evaluation.keep_features", "evaluation.keep_pictures",
    "score.originals", "score.reconstructions", "score.brain_features", "score.image_features",
    "evaluation.image_groups", "evaluation.image_classes", "evaluation.judges_dir", "training.target_subject",
    "training.reader_threads", "training.checkpoint_every", "training.keep_checkpoints", "training.validate_every",
)  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """One evaluated run.

    Args:
        folder: Its folder.
        metrics: Content of its metrics.json.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Points and controls."""
        return [*self.metrics["points"], *self.metrics["controls"]]

    @property
    def layout(self) -> Layout:
        """Its paths."""
        return Layout(self.folder, self.metrics["protocol"])

    def fact(self, name: str) -> Any:  # Any: JSON
        """Return a fact that joined runs must share."""
        return self.metrics.get(name, self.metrics["provenance"].get(name))

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide its numbers, by dotted key."""
        flat: dict[str, Any] = {}
        for key, value in self.metrics["provenance"]["config"].items():
            flat |= (
                {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
            )
        return {key: value for key, value in flat.items() if not {key, key.partition(".")[0]} & set(OF_NO_ACCOUNT)}


def merge_runs(out_dir: Path, run_dirs: Sequence[Path]) -> int:
    """Write a run folder with the points of several runs; return how many points it has.

    Args:
        out_dir: Folder without a metrics.json.
        run_dirs: Evaluated runs; the first one's recipe is what others' settings are compared with.

    Raises:
        DataError: a run was not evaluated, the runs do not belong together, or one point has two different results.
    """
    if (out_dir / "metrics.json").exists():
        raise DataError("The folder holds metrics already.", where=str(out_dir), todo="choose a new folder")
    runs = [_read_run(folder) for folder in run_dirs]
    first = runs[0]
    for run in runs[1:]:
        _check_together(first, run)
    target = Layout(out_dir, first.metrics["protocol"])
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    scores: dict[tuple[int, Point], Scores] = {}
    for run in runs:
        own = _own_settings(first, run)
        for entry in run.entries:
            point, subject = _renamed(Point.of(entry), own), int(entry["subject"])
            sources, place = run.layout.score_folders(Point.of(entry), subject), target.score(point, subject)
            _check_same_result(sources[0], place, point)
            for source, copy in zip(sources, (place, target.joined_retrieval(point, subject)), strict=False):
                _link(source, copy)
            _link(run.folder / entry["folder"], target.pictures(point, subject))
            folder = str(target.pictures(point, subject).relative_to(out_dir))
            joined = {**point.describe(), "subject": subject, "folder": folder, "metrics": entry["metrics"]}
            joined |= {name: entry[name] for name in ("groups", GENERALISATION) if name in entry}
            entries[entry_key(joined)] = joined
            scores[subject, point] = read_scores(*sources)
        for image_id in {image_id for ids in run.metrics["images"].values() for image_id in ids}:
            _link(run.layout.original_of(image_id), target.originals / image_name(image_id))
    _write(out_dir, runs, [entries[key] for key in sorted(entries)], scores)
    return len(entries)


def _read_run(folder: Path) -> FinishedRun:
    path = folder / "metrics.json"
    metrics = read_json(path)
    if metrics.get("format") != FORMAT:
        raise DataError(
            "The metrics are of an older format.", where=str(path), expected=FORMAT, found=metrics.get("format"),
            todo="run `nd evaluate` with the run's config.yaml again: what is finished is kept",
        )  # fmt: skip
    return FinishedRun(folder, metrics)


def _check_together(first: FinishedRun, other: FinishedRun) -> None:
    """Refuse runs whose numbers do not compare."""
    for name in SAME:
        if first.fact(name) != other.fact(name):
            raise DataError(
                f"These runs differ in what must be equal: {name}.",
                where=str(other.folder),
                expected=first.fact(name),
                found=other.fact(name),
            )
    for subject, ids in other.metrics["images"].items():
        if first.metrics["images"].get(subject, ids) != ids:
            raise DataError(f"Subject {subject} was evaluated on other images.", where=str(other.folder))


def _own_settings(first: FinishedRun, run: FinishedRun) -> dict[str, Scalar]:
    """Return the settings in which a run differs from the first one."""
    base = first.settings()
    # a key that only one of them has is younger than the other run, which had its default
    differing = {key: value for key, value in run.settings().items() if base.get(key, value) != value}
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else canonical_json(value) for key, value in differing.items()}


def _renamed(point: Point, own: Mapping[str, Scalar]) -> Point:
    settings = {**own, **dict(point.settings)}
    return Point(point.kappa, point.eta, tuple(sorted(settings.items())), point.control)


def _check_same_result(source: Path, place: Path, point: Point) -> None:
    """Refuse a second, different result of one point."""
    present = read_record(place)
    if present and present.get("metrics") != read_record(source).get("metrics"):
        raise DataError(
            "Two runs have different results for one point, and their recipes do not say why.",
            where=f"{point.name}: {source}",
            todo="leave one of the runs out",
        )


def _link(source: Path, target: Path) -> None:
    """Make a folder appear at another place too: hard links, or copies on another file system."""
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    if os.path.exists(target):
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write(
    out_dir: Path,
    runs: Sequence[FinishedRun],
    entries: list[dict[str, Any]],
    scores: Mapping[tuple[int, Point], Scores],
) -> None:
    """Write the joined metrics.json."""
    first = runs[0].metrics
    sampler = first["provenance"]["config"]["sampler"]
    merged = [
        {"run": str(run.folder), "code": run.fact("code"), "config_hash": run.fact("config_hash")} for run in runs
    ]
    images = {subject: ids for run in reversed(runs) for subject, ids in run.metrics["images"].items()}
    facts = {
        **{name: value for name, value in first.items() if name not in ("points", "controls")},
        "images": dict(sorted(images.items())),
        "absent": {name: text for run in runs for name, text in run.metrics["absent"].items()},
        "provenance": {**first["provenance"], "merged": merged},
    }
    recipe = Point(float(sampler["kappa"]), float(sampler["eta"]))
    statistics = Statistics(first["provenance"]["bootstrap"])
    write_json(out_dir / "metrics.json", metrics_content(facts, entries, scores, recipe, statistics))
