"""The content of metrics.json: points with their metrics, paired comparisons with no guidance, and provenance.

The same numbers in the same order for any number of ranks. Points of another call with the same settings (an
evaluation and then a sweep, two sweeps) stand in one file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nd_dist.errors import DataError
from nd_dist.evaluation.leases import Task
from nd_dist.evaluation.records import has_result, read_record
from nd_dist.evaluation.score import compare, read_arrays
from nd_dist.evaluation.source import NSD_IMAGES
from nd_dist.evaluation.stages import Bench, point_metrics, summed_repeats
from nd_dist.evaluation.units import Point
from nd_dist.files import read_json, write_json
from nd_dist.provenance import provenance

FORMAT = 1
BASELINE = Point(0.0, 0.0)


def metrics_task(bench: Bench) -> Task:
    """Return the last task: write metrics.json."""
    return Task("metrics", lambda: _is_complete(bench), lambda: write_metrics(bench))


def _is_complete(bench: Bench) -> bool:
    """Return whether metrics.json has all points of this job, made with its settings."""
    present = {_key(entry) for entry in _present(bench).get("points", [])}
    wanted = {(s, point.kappa, point.eta) for point in bench.job.points for s in bench.job.subjects}
    return wanted <= present


def _present(bench: Bench) -> dict[str, Any]:
    """Return metrics.json if its points were made with this job's settings, otherwise nothing."""
    path = bench.job.layout.metrics
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except DataError:
        return {}
    is_ours = isinstance(content, dict) and content.get("fingerprint") == bench.prints.run
    return content if is_ours else {}


def write_metrics(bench: Bench) -> None:
    """Write metrics.json from the scores on disk, keeping points that other calls with the same settings made."""
    job = bench.job
    entries = {_key(entry): entry for entry in _present(bench).get("points", [])}
    for point in job.points:
        for subject in job.subjects:
            entry = {
                "kappa": point.kappa,
                "eta": point.eta,
                "subject": subject,
                "folder": str(job.layout.pictures(point, subject).relative_to(job.layout.run_dir)),
                "metrics": point_metrics(bench, point, subject),
            }
            entries[_key(entry)] = entry
    points = [entries[key] for key in sorted(entries)]
    write_json(
        job.layout.metrics,
        {
            "format": FORMAT,
            "fingerprint": bench.prints.run,
            "protocol": job.protocol.name,
            "protocol_details": job.protocol.describe(),
            "departures": job.protocol.departures(len(job.all_images()), job.config.evaluation.num_repeats),
            "split": job.split,
            "simulated": job.source.index.num_images != NSD_IMAGES,
            "images": {str(subject): list(job.images(subject)) for subject in job.subjects},
            "points": points,
            "comparisons": _comparisons(bench, points),
            "provenance": _provenance(bench),
        },
    )


def _key(entry: dict[str, Any]) -> tuple[int, float, float]:
    """Return what orders points: subject, kappa, eta."""
    return int(entry["subject"]), float(entry["kappa"]), float(entry["eta"])


def _comparisons(bench: Bench, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the paired difference to no guidance of every guided point whose scores are on disk."""
    layout, found = bench.job.layout, []
    for entry in points:
        point, subject = Point(entry["kappa"], entry["eta"]), int(entry["subject"])
        folders = [layout.score(item, subject) for item in (point, BASELINE)]
        prints = [bench.prints.score(item, subject) for item in (point, BASELINE)]
        if not point.is_guided or not all(map(has_result, folders, prints)):
            continue
        pair = [read_arrays(folder) for folder in folders]
        differences = compare(pair[0], pair[1], summed_repeats(bench.job), bench.statistics)
        found.append(
            {
                "kappa": point.kappa,
                "eta": point.eta,
                "subject": subject,
                "against": "no guidance",
                "differences": {name: dataclasses.asdict(value) for name, value in differences.items()},
            }
        )
    return found


def _provenance(bench: Bench) -> dict[str, Any]:
    """Return where the numbers come from."""
    job, prints = bench.job, bench.prints
    decoded = [job.layout.decoded(subject) for subject in job.subjects] if bench.is_decoded else []
    return provenance(
        job.config,
        shards=prints.settings["shards"],
        networks=prints.settings["networks"],
        decoding=prints.settings["decoding"],
        judges=prints.judging["judges"],
        bootstrap=prints.statistics["bootstrap"],
        decoded_images={folder.name: len(read_record(folder)["image_ids"]) for folder in decoded},
    )
