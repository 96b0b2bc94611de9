"""The content of metrics.json: points with their metrics, controls, paired comparisons, selection, and provenance.

The same numbers in the same order for any number of ranks. Points of another call with the same settings (an
evaluation and then a sweep, two sweeps) stand in one file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nd_dist.compute.device import platform_facts
from nd_dist.errors import DataError
from nd_dist.evaluation.points.units import Point, recipe_point
from nd_dist.evaluation.reconstruction.decode import STATISTICS_FOLDER
from nd_dist.evaluation.scoring.comparisons import ALL_SUBJECTS, Key, averages, comparisons
from nd_dist.evaluation.scoring.score import read_scores
from nd_dist.fanout.results import OUTDATED, has_result, read_record
from nd_dist.fanout.tasks import Steps, Task
from nd_dist.files import hash_json, read_json, write_json
from nd_dist.metrics.generalisation import KEY as GENERALISATION
from nd_dist.metrics.statistics.scores import Scores, Statistics
from nd_dist.provenance import provenance

if TYPE_CHECKING:  # they bring Stable Diffusion, which nobody needs to join finished runs
    from nd_dist.evaluation.bench import Bench
    from nd_dist.evaluation.job import Job, Keys

FORMAT = 3

Entry = dict[str, Any]  # Any: JSON


def metrics_task(bench: Bench) -> Task:
    """Return the last task: write metrics.json."""

    def work() -> Steps:
        write_metrics(bench)
        yield

    return Task("metrics", lambda: _is_complete(bench), work)


def _is_complete(bench: Bench) -> bool:
    """Return whether metrics.json has all points of this job, made with its settings, and its selection."""
    present = _present(bench)
    found = {entry_key(entry) for entry in _entries(present)}
    wanted = {(s, *point.order) for point in bench.job.points for s in bench.job.subjects}
    selection = bench.job.selection or present.get("selection")
    return wanted <= found and present.get("selection") == selection


def settle_metrics(job: Job, keys: Keys) -> str:
    """Make room for this job's metrics.json: that of other settings or images moves aside, its own comes back.

    Returns:
        What was done, for people; empty where nothing was.
    """
    path, aside = job.layout.metrics, job.layout.work / OUTDATED
    told = ""
    present = _read(path)
    if present and not _is_ours(job, keys, present):
        home = aside / f"metrics-{hash_json([present.get('fingerprint'), present.get('images')])[:8]}.json"
        home.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, home)
        count = len(present.get("points", []))
        told = f"{count} points of other settings or images set aside in {home}; running with those brings them back"
    if not path.exists():
        for home in sorted(aside.glob("metrics-*.json")):
            if _is_ours(job, keys, found := _read(home)):
                os.replace(home, path)
                return f"{told + '. ' if told else ''}{len(found['points'])} points of these settings brought back"
    return told


def _is_ours(job: Job, keys: Keys, content: dict[str, Any]) -> bool:
    """Return whether points were made with this job's settings on its images."""
    images = content.get("images", {})
    same = all(images.get(str(s), list(job.images(s))) == list(job.images(s)) for s in job.subjects)
    return content.get("fingerprint") == keys.key("run") and same


def _read(path: Path) -> dict[str, Any]:
    """Return a metrics.json, empty where there is none or it is no JSON object."""
    try:
        content = read_json(path) if path.exists() else {}
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _present(bench: Bench) -> dict[str, Any]:
    """Return metrics.json if its points were made with this job's settings, otherwise nothing."""
    content = _read(bench.job.layout.metrics)
    return content if _is_ours(bench.job, bench.keys, content) else {}


def _entries(content: dict[str, Any]) -> list[Entry]:
    return [*content.get("points", []), *content.get("controls", [])]


def write_metrics(bench: Bench) -> None:
    """Write metrics.json from the scores on disk, keeping points that other calls with the same settings made."""
    job, present = bench.job, _present(bench)
    entries = {entry_key(entry): entry for entry in (*_entries(present), *scored_entries(bench))}
    own = {str(subject): list(job.images(subject)) for subject in job.subjects}
    selection = job.selection or present.get("selection")
    facts = {
        "fingerprint": bench.keys.key("run"),
        "protocol": job.protocol.name,
        "protocol_details": job.protocol.describe(),
        "departures": [
            *job.protocol.departures(len(job.all_images()), job.config.evaluation.num_repeats),
            *job.departures,
        ],
        "split": job.split,
        **({"subject_names": {str(s): name for s, name in job.subject_names.items()}} if job.subject_names else {}),
        "simulated": job.is_simulated,
        "images": {**present.get("images", {}), **own},
        "absent": dict(bench.keys.absent),
        **({"selection": selection} if selection else {}),
        "provenance": _provenance(bench),
    }
    ordered = [entries[key] for key in sorted(entries)]
    write_json(
        job.layout.metrics,
        metrics_content(facts, ordered, _scores(bench, ordered), recipe_point(job.config), bench.statistics),
    )


def scored_entries(bench: Bench) -> list[Entry]:
    """Return every point of every subject of a job as JSON; all are scored."""
    job, found = bench.job, []
    for point in job.points:
        for subject in job.subjects:
            folder = str(job.layout.pictures(point, subject).relative_to(job.layout.run_dir))
            metrics = read_scores(*bench.score_folders(point, subject)).metrics
            record = read_record(job.layout.score(point, subject))
            # failures: reconstructions that were not finite; they count as grey pictures
            more = {name: record[name] for name in ("groups", GENERALISATION, "failures") if record.get(name)}
            found.append({**point.describe(), "subject": subject, "folder": folder, "metrics": metrics, **more})
    return found


def metrics_content(
    facts: Mapping[str, Any],
    entries: Sequence[Entry],
    scores: Mapping[Key, Scores],
    recipe: Point,
    statistics: Statistics,
) -> dict[str, Any]:
    """Return the content of a metrics.json: facts, points and controls, their means, and what is compared.

    Args:
        facts: What else stands in it.
        entries: Every point of every subject, in order.
        scores: (subject, point) -> scores, as far as they are on disk.
        recipe: The point that others are compared with.
        statistics: Resamples.
    """
    means = averages(scores, statistics)
    return {
        "format": FORMAT,
        **facts,
        "points": [entry for entry in entries if "control" not in entry],
        "controls": [entry for entry in entries if "control" in entry],
        "averages": [
            {**point.describe(), "subject": subject, "metrics": found.metrics, **_mean_groups(entries, subject, point)}
            for (subject, point), found in means.items()
        ],
        "comparisons": comparisons({**means, **scores}, recipe),
    }


def _mean_groups(entries: Sequence[Entry], subject: int, point: Point) -> Entry:
    """Return the means of named groups that all parts of a mean have, without intervals; nothing without groups."""

    def is_part(entry: Entry) -> bool:
        own = Point.of(entry)
        is_there = own.without_seed == point.without_seed if point.is_seed_mean else own == point
        return is_there and subject in (ALL_SUBJECTS, int(entry["subject"]))

    parts = [entry.get("groups", {}) for entry in entries if is_part(entry)]
    groups: dict[str, Entry] = {}
    for name in set.intersection(*map(set, parts)) if parts else ():
        every = [part[name] for part in parts]
        groups[name] = {
            metric: {
                **every[0][metric],
                "value": math.fsum(found[metric]["value"] for found in every) / len(every),
                "ci_low": None,
                "ci_high": None,
            }
            for metric in set.intersection(*map(set, every))
        }
    return {"groups": groups} if groups else {}


def entry_key(entry: Entry) -> tuple[Any, ...]:
    """Return what orders points: subject, control, settings, kappa, eta."""
    return int(entry["subject"]), *Point.of(entry).order


def _scores(bench: Bench, entries: list[Entry]) -> dict[tuple[int, Point], Scores]:
    """Return the scores of every entry of this job's subjects that are on disk."""
    found = {}
    for entry in entries:
        point, subject = Point.of(entry), int(entry["subject"])
        folder = bench.job.layout.score(point, subject)
        if subject in bench.keys.images and has_result(folder, bench.keys.key("score", point, subject)):
            found[subject, point] = read_scores(*bench.score_folders(point, subject))
    return found


def _provenance(bench: Bench) -> dict[str, Any]:
    """Return where the numbers come from."""
    job, keys = bench.job, bench.keys
    decoded = [job.layout.decoded(point, subject) for point in job.decodings() for subject in job.subjects]
    return provenance(
        job.config,
        computed_on=platform_facts(job.networks.device),
        shards=keys.own["shards"],
        networks=keys.own["networks"],
        decoding=keys.own["decoding"],
        judges=keys.judging["judges"],
        bootstrap=keys.statistics["bootstrap"],
        decoded_images={folder.name: len(read_record(folder / STATISTICS_FOLDER)["image_ids"]) for folder in decoded},
    )
