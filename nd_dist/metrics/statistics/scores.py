"""The numbers of one point: values with intervals, what each image adds to them, comparisons and means of several.

Every metric's values on the shared resamples are kept, so that any two points can be compared later without their
features. Legend: N images, U images of any of several scores, B bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.metrics.identification import Distractors
from nd_dist.metrics.retrieval import normal_interval
from nd_dist.metrics.statistics.bootstrap import (
    Counts,
    Difference,
    difference,
    mean_of,
    mean_resampled,
    percentiles,
    resample_counts,
    two_way_added,
    two_way_of,
    two_way_resampled,
)  # fmt: skip
from nd_dist.metrics.table import metric_of

WINS = "wins."
EACH = "each."
RESAMPLED = "resampled."
ADDED = "added."
DRAWS = "draws."

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """How metrics become intervals: resamples shared by all metrics and points of a set of images.

    Args:
        num_resamples: B.
        seed: The same for every run: points of different runs and seeds are then compared in pairs.
    """

    num_resamples: int
    seed: int = 0

    def counts(self, num_images: int) -> Counts:
        """Return the resamples of N images (B, N)."""
        return _counts(num_images, self.num_resamples, self.seed)


@lru_cache(maxsize=1)
def _counts(num_images: int, num_resamples: int, seed: int) -> Counts:
    """Return resamples; those that were made last stay at hand, because all metrics share them."""
    counts_BN = resample_counts(num_images, num_resamples, seed)
    counts_BN.setflags(write=False)
    return counts_BN


@dataclass(frozen=True)
class Scored:
    """One metric of a point.

    Args:
        value: Of all images.
        num_images: N.
        higher_is_better: Its direction.
        resampled_B: Its value on every resample; none: it has no interval.
        added_N: What each image adds, whose mean is the value; none: nothing that is tested image by image.
    """

    value: float
    num_images: int
    higher_is_better: bool
    resampled_B: Float64 | None = None
    added_N: Float64 | None = None

    def as_json(self) -> dict[str, Any]:
        """Return value, interval over images, n and direction."""
        low, high = (None, None) if self.resampled_B is None else percentiles(self.resampled_B, self.num_images)
        return {
            "value": self.value,
            "ci_low": low,
            "ci_high": high,
            "n": self.num_images,
            "higher_is_better": self.higher_is_better,
        }


def scored_arrays(
    arrays: Mapping[str, torch.Tensor], num_repeats: int, distractors: Distractors, statistics: Statistics
) -> dict[str, Scored]:
    """Return the metrics that ``score_images`` made arrays for.

    Args:
        arrays: From ``score_images``.
        num_repeats: Repeats summed in the wins.
        distractors: Whose features were the distractors of the wins.
        statistics: Resamples.
    """
    found = {}
    for key in sorted(arrays):
        name, values, counts_BN = key.partition(".")[2], arrays[key].numpy(), statistics.counts(len(arrays[key]))
        if key.startswith(WINS):
            value, resampled_B = two_way_of(values, num_repeats), two_way_resampled(values, counts_BN, num_repeats)
            added_N = two_way_added(values, distractors, num_repeats)
        else:
            value, resampled_B, added_N = mean_of(values), mean_resampled(values, counts_BN), values
        higher = metric_of(name, higher_is_better=key.startswith(WINS)).higher_is_better
        found[name] = Scored(value, len(values), higher, resampled_B, added_N)
    return found


def kept_arrays(scored: Mapping[str, Scored]) -> dict[str, torch.Tensor]:
    """Return ``resampled.NAME`` (B,) and ``added.NAME`` (N,) float64 of metrics, for later comparisons and means."""
    kept = {RESAMPLED + name: item.resampled_B for name, item in scored.items()}
    kept |= {ADDED + name: item.added_N for name, item in scored.items()}
    return {key: torch.from_numpy(np.array(array)) for key, array in kept.items() if array is not None}


@dataclass(frozen=True)
class Scores:
    """A scored point on disk, or a mean of some.

    Args:
        metrics: Metric name -> value, interval, n, direction.
        image_ids: Its images.
        arrays: ``resampled.NAME``, ``added.NAME`` and ``draws.NAME`` of its metrics.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    image_ids: tuple[int, ...]
    arrays: Mapping[str, Float64]


def compare(first: Scores, second: Scores) -> dict[str, Difference]:
    """Return the paired difference (first minus second) of every metric that both points have on the same images."""
    found = {}
    if first.image_ids == second.image_ids:
        for name in sorted(set(first.metrics) & set(second.metrics)):
            if all(RESAMPLED + name in scores.arrays for scores in (first, second)):
                pair = [(float(s.metrics[name]["value"]), s.arrays[RESAMPLED + name]) for s in (first, second)]
                found[name] = difference(pair[0], pair[1], len(first.image_ids))
    return found


def mean_of_scores(parts: Sequence[Scores], statistics: Statistics) -> Scores:
    """Return the mean of several scores, with intervals from images that are resampled jointly.

    Where the images differ, each part's mean over its own of the drawn images counts, linearised.
    """
    image_ids = tuple(sorted({image_id for part in parts for image_id in part.image_ids}))
    is_same = all(part.image_ids == image_ids for part in parts)
    metrics: dict[str, Mapping[str, Any]] = {}
    arrays: dict[str, Float64] = {}
    for name in sorted(set.intersection(*(set(part.metrics) for part in parts))):
        items = [part.metrics[name] for part in parts]
        value = math.fsum(float(item["value"]) for item in items) / len(parts)
        kept = {
            prefix: [part.arrays[prefix + name] for part in parts]
            for prefix in (RESAMPLED, ADDED, DRAWS)
            if all(prefix + name in part.arrays for part in parts)
        }
        added_U = _joined(kept[ADDED], parts, image_ids) if ADDED in kept else None
        resampled_B = np.mean(kept[RESAMPLED], axis=0) if RESAMPLED in kept and is_same else None
        if not is_same and added_U is not None:
            resampled_B = mean_resampled(added_U, statistics.counts(len(image_ids)))
        scored = Scored(value, len(image_ids), bool(items[0]["higher_is_better"]), resampled_B, added_U)
        found = {**items[0], **scored.as_json()}
        if DRAWS in kept and is_same:
            arrays[DRAWS + name] = np.mean(kept[DRAWS], axis=0)
            found["ci_low"], found["ci_high"] = normal_interval(arrays[DRAWS + name])
        metrics[name] = found
        arrays |= {RESAMPLED + name: resampled_B} if resampled_B is not None else {}
        arrays |= {ADDED + name: added_U} if added_U is not None else {}
    return Scores(metrics, image_ids, arrays)


def _joined(added: Sequence[Float64], parts: Sequence[Scores], image_ids: tuple[int, ...]) -> Float64:
    """Return (U,) what each image adds to the mean of the parts."""
    place = {image_id: number for number, image_id in enumerate(image_ids)}
    total_U = np.zeros(len(image_ids))
    for part, added_N in zip(parts, added, strict=True):
        total_U[[place[image_id] for image_id in part.image_ids]] += added_N / len(added_N)
    return np.asarray(total_U * (len(image_ids) / len(parts)), dtype=np.float64)
