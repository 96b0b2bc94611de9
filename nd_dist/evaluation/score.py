"""From judged images on disk to the numbers of one guidance point and subject, with intervals over images.

Streams: per judge and repeat only blocks of features are in memory, never pictures. Legend: N images, R repeats, D
feature values, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from nd_dist.checkpoint import read_tensors
from nd_dist.evaluation.layout import ARRAYS, FEATURES
from nd_dist.evaluation.records import read_record
from nd_dist.frozen.judges import Judge, Score
from nd_dist.metrics.bootstrap import (
    Counts,
    Difference,
    difference,
    interval,
    mean_of,
    mean_resampled,
    resample_counts,
    two_way_of,
    two_way_resampled,
)
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, wins
from nd_dist.metrics.protocols import Protocol
from nd_dist.metrics.table import metric_of

PIXEL_METRICS = ("pixcorr", "ssim", "repeat_pixcorr", "repeat_ssim")
WINS = "wins."
EACH = "each."
BLOCK_IMAGES = 128

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class JudgedImages:
    """Judged images of one point and subject on disk.

    Args:
        recons: Folder of each image's judged reconstructions, in the order of the image ids.
        originals: Folder of each image's judged original, same order.
        num_repeats: R.
    """

    recons: Sequence[Path]
    originals: Sequence[Path]
    num_repeats: int

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.recons)


def score_images(judged: JudgedImages, judges: Mapping[str, Score], protocol: Protocol) -> dict[str, torch.Tensor]:
    """Return what all metrics of a point are made of: ``each.NAME`` (N,) float64 or ``wins.NAME`` (N, N) int32.

    Args:
        judged: The images.
        judges: Judge name -> which comparison its features are for.
        protocol: Distractors and how repeats are reduced.
    """
    arrays = {EACH + name: torch.from_numpy(values) for name, values in _pixel_arrays(judged, protocol).items()}
    for name, score in judges.items():
        if score == "distance":
            arrays[EACH + name] = torch.from_numpy(_distances(judged, name, protocol))
        elif len(judged) > 1:
            arrays[WINS + name] = torch.from_numpy(_wins(judged, name, protocol))
    return arrays


def _pixel_arrays(judged: JudgedImages, protocol: Protocol) -> dict[str, Float64]:
    """Return one value per image of every pixel metric, repeats reduced as the protocol says."""
    records = [read_record(folder)["metrics"] for folder in judged.recons]
    arrays = {}
    for name in PIXEL_METRICS:
        if name in records[0]:
            values = [record[name] for record in records]
            arrays[name] = np.array(
                [_reduced(value, protocol) if isinstance(value, list) else value for value in values]
            )
    return arrays


def _reduced(values_R: Sequence[float], protocol: Protocol) -> float:
    """Return one number of an image's repeats: the first, or their mean."""
    return values_R[0] if protocol.repeats == "first" else mean_of(np.asarray(values_R, dtype=np.float64))


def _used_repeats(judged: JudgedImages, protocol: Protocol) -> range:
    return range(1) if protocol.repeats == "first" else range(judged.num_repeats)


def _distances(judged: JudgedImages, judge: str, protocol: Protocol) -> Float64:
    """Return the correlation distance of each image, mean over the repeats that count."""
    reals = FeatureRows(judged.originals, judge, 0)
    per_repeat = []
    for repeat in _used_repeats(judged, protocol):
        recons = FeatureRows(judged.recons, judge, repeat)
        blocks = [slice(start, start + BLOCK_IMAGES) for start in range(0, len(judged), BLOCK_IMAGES)]
        per_repeat.append(np.concatenate([correlation_distance(reals[rows], recons[rows]) for rows in blocks]))
    return np.asarray(np.stack(per_repeat).sum(axis=0) / len(per_repeat), dtype=np.float64)


def _wins(judged: JudgedImages, judge: str, protocol: Protocol) -> npt.NDArray[np.int32]:
    """Return (N, N): how many repeats of pair j beat distractor k (1 or 0 where correlations are averaged first)."""
    reals = FeatureRows(judged.originals, judge, 0)
    matrices = (
        correlation_matrix(reals, FeatureRows(judged.recons, judge, repeat), BLOCK_IMAGES)
        for repeat in _used_repeats(judged, protocol)
    )
    if protocol.repeats == "mean_correlation":
        total = np.sum(np.stack(list(matrices)), axis=0) / judged.num_repeats
        return wins(total, protocol.distractors).astype(np.int32)
    won = [wins(matrix, protocol.distractors) for matrix in matrices]
    return np.asarray(np.sum(won, axis=0), dtype=np.int32)


class FeatureRows:
    """Features of one judge and repeat as rows that are read from disk when sliced.

    Args:
        folders: One judged image per row.
        judge: Name of the judge.
        repeat: Which repeat (0 for originals).
    """

    def __init__(self, folders: Sequence[Path], judge: str, repeat: int) -> None:
        self._folders, self._judge, self._repeat = folders, judge, repeat

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._folders)

    def __getitem__(self, rows: slice) -> npt.NDArray[np.float32]:
        """Return some rows (B, D)."""
        return np.stack([self._row(folder) for folder in self._folders[rows]])

    def _row(self, folder: Path) -> npt.NDArray[np.float32]:
        with safe_open(folder / FEATURES, framework="numpy") as content:
            row: npt.NDArray[np.float32] = content.get_slice(self._judge)[self._repeat]
        return row


@dataclass(frozen=True)
class Statistics:
    """How metrics become intervals: resamples shared by all metrics and points of a set of images.

    Args:
        num_resamples: B.
        seed: Seed of the run.
    """

    num_resamples: int
    seed: int

    def counts(self, num_images: int) -> Counts:
        """Return the resamples of N images (B, N)."""
        return resample_counts(num_images, self.num_resamples, self.seed)


def metrics_of(arrays: Mapping[str, torch.Tensor], num_repeats: int, statistics: Statistics) -> dict[str, Any]:
    """Return the metrics of a point as JSON: value, interval over images, n, direction.

    Args:
        arrays: From ``score_images``.
        num_repeats: Repeats summed in the wins.
        statistics: Resamples.
    """
    metrics = {}
    for key in sorted(arrays):
        name = key.partition(".")[2]
        num_images = len(arrays[key])
        value, resampled_B = _resampled(key, arrays[key], num_repeats, statistics.counts(num_images))
        found = interval(value, resampled_B, num_images)
        metrics[name] = {
            "value": found.value,
            "ci_low": found.ci_low,
            "ci_high": found.ci_high,
            "n": found.n,
            "higher_is_better": metric_of(name, higher_is_better=key.startswith(WINS)).higher_is_better,
        }
    return metrics


def compare(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], num_repeats: int, statistics: Statistics
) -> dict[str, Difference]:
    """Return the paired difference (first minus second) of every metric that both points have on the same images."""
    found = {}
    for key in sorted(set(first) & set(second)):
        num_images = len(first[key])
        counts = statistics.counts(num_images)
        pair = [_resampled(key, arrays[key], num_repeats, counts) for arrays in (first, second)]
        found[key.partition(".")[2]] = difference(pair[0], pair[1], num_images)
    return found


def _resampled(key: str, array: torch.Tensor, num_repeats: int, counts_BN: Counts) -> tuple[float, Float64]:
    """Return a metric's value and its value on each resample."""
    values = array.numpy()
    if key.startswith(WINS):
        return two_way_of(values, num_repeats), two_way_resampled(values, counts_BN, num_repeats)
    return mean_of(values), mean_resampled(values, counts_BN)


def read_arrays(folder: Path) -> dict[str, torch.Tensor]:
    """Return the arrays of a scored point."""
    return read_tensors(folder / ARRAYS)


def judge_scores(judges: Sequence[Judge]) -> dict[str, Score]:
    """Return judge name -> comparison."""
    return {judge.name: judge.score for judge in judges}
