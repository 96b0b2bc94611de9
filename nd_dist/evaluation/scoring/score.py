"""From judged images on disk to the numbers of one guidance point and subject, read and written.

Streams: per judge and repeat only blocks of features are in memory, never pictures. Legend: N images, R repeats, D
feature values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from nd_dist.checkpoint import read_tensors
from nd_dist.evaluation.points.layout import ARRAYS, FEATURES
from nd_dist.fanout.results import read_record
from nd_dist.frozen.judges import Judge, Score
from nd_dist.metrics.bootstrap import (
    mean_of,
)
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.distribution import frechet_distance, kernel_distance, kernel_distance_resampled, kernels
from nd_dist.metrics.identification import correlation_matrix, wins
from nd_dist.metrics.protocols import Protocol
from nd_dist.metrics.scores import ADDED, DRAWS, EACH, RESAMPLED, WINS, Float64, Scored, Scores, Statistics

BLOCK_BYTES = 32 << 20  # of features (float64) of one side in memory at a time


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

    @property
    def judges(self) -> list[str]:
        """Names of the judges whose features are there."""
        with safe_open(self.originals[0] / FEATURES, framework="numpy") as content:
            return list(content.keys())

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.recons)


def score_images(
    judged: JudgedImages, judges: Mapping[str, Score], protocol: Protocol
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what all metrics of a point are made of: ``each.NAME`` (N,) float64 or ``wins.NAME`` (N, N) int32.

    Args:
        judged: The images.
        judges: Judge name -> which comparison its features are for.
        protocol: Distractors and how repeats are reduced.
    """
    for name, values in _pixel_arrays(judged, protocol).items():
        yield EACH + name, torch.from_numpy(values)
    for name, score in judges.items():
        if score == "distance":
            yield EACH + name, torch.from_numpy(_distances(judged, name, protocol))
        elif score == "two_way" and len(judged) > 1:
            yield WINS + name, torch.from_numpy(_wins(judged, name, protocol))


def _pixel_arrays(judged: JudgedImages, protocol: Protocol) -> dict[str, Float64]:
    """Return one value per image of every metric made image by image, repeats reduced as the protocol says."""
    records = [read_record(folder)["metrics"] for folder in judged.recons]
    return {
        name: np.array(
            [_reduced(value, protocol) if isinstance(value, list) else value for value in (r[name] for r in records)]
        )
        for name in records[0]
    }


def _reduced(values_R: Sequence[float], protocol: Protocol) -> float:
    """Return one number of an image's repeats: the first, or their mean."""
    return values_R[0] if protocol.repeats == "first" else mean_of(np.asarray(values_R, dtype=np.float64))


def used_repeats(judged: JudgedImages, protocol: Protocol) -> range:
    """Return the repeats that count."""
    return range(1) if protocol.repeats == "first" else range(judged.num_repeats)


def _distances(judged: JudgedImages, judge: str, protocol: Protocol) -> Float64:
    """Return the correlation distance of each image, mean over the repeats that count."""
    reals = FeatureRows(judged.originals, judge, 0)
    per_repeat = []
    for repeat in used_repeats(judged, protocol):
        recons = FeatureRows(judged.recons, judge, repeat)
        blocks = [slice(start, start + reals.block) for start in range(0, len(judged), reals.block)]
        per_repeat.append(np.concatenate([correlation_distance(reals[rows], recons[rows]) for rows in blocks]))
    return np.asarray(np.stack(per_repeat).sum(axis=0) / len(per_repeat), dtype=np.float64)


def _wins(judged: JudgedImages, judge: str, protocol: Protocol) -> npt.NDArray[np.int32]:
    """Return (N, N): how many repeats of pair j beat distractor k (1 or 0 where correlations are averaged first)."""
    reals = FeatureRows(judged.originals, judge, 0)
    matrices = (
        correlation_matrix(reals, FeatureRows(judged.recons, judge, repeat), reals.block)
        for repeat in used_repeats(judged, protocol)
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

    @cached_property
    def block(self) -> int:
        """How many rows to work on at a time: as many as ``BLOCK_BYTES`` hold."""
        return max(1, BLOCK_BYTES // (8 * self._row(self._folders[0]).size))

    def __getitem__(self, rows: slice) -> npt.NDArray[np.float32]:
        """Return some rows (B, D)."""
        return np.stack([self._row(folder) for folder in self._folders[rows]])

    def _row(self, folder: Path) -> npt.NDArray[np.float32]:
        with safe_open(folder / FEATURES, framework="numpy") as content:
            row: npt.NDArray[np.float32] = content.get_slice(self._judge)[self._repeat]
        return row


def scored_sets(
    judged: JudgedImages, judges: Mapping[str, Score], protocol: Protocol, statistics: Statistics
) -> dict[str, Scored]:
    """Return FID and KID where there is a judge for them: means over the repeats that count.

    FID has no interval here: a resample repeats pictures, which its estimate of covariances does not survive.
    """
    names = [name for name, score in judges.items() if score == "distribution"]
    if not names or len(judged) < 2:
        return {}
    reals, num = FeatureRows(judged.originals, names[0], 0), len(judged)
    repeats = [FeatureRows(judged.recons, names[0], repeat) for repeat in used_repeats(judged, protocol)]
    fid = mean_of(np.array([frechet_distance(reals, recons) for recons in repeats]))
    counts_BN = statistics.counts(num)
    pairs = [
        (kernel_distance(made), kernel_distance_resampled(made, counts_BN))
        for made in (kernels(reals, recons) for recons in repeats)
    ]
    kid = mean_of(np.array([value for value, _ in pairs]))
    resampled_B = np.stack([values for _, values in pairs]).mean(axis=0)
    return {"fid": Scored(fid, num, False), "kid": Scored(kid, num, False, resampled_B)}


def read_scores(*folders: Path) -> Scores:
    """Return a scored point: what its folders (scores of pictures, of retrieval) hold, but the arrays of pairs."""
    metrics: dict[str, Any] = {}
    arrays: dict[str, Float64] = {}
    image_ids: tuple[int, ...] = ()
    for folder in folders:
        record = read_record(folder)
        metrics |= record["metrics"]
        image_ids = image_ids or tuple(record["image_ids"])
        with safe_open(folder / ARRAYS, framework="numpy") as content:
            for key in content.keys():  # noqa: SIM118
                if key.startswith((RESAMPLED, ADDED, DRAWS)):
                    arrays[key] = content.get_tensor(key)
    return Scores(metrics, image_ids, arrays)


def read_arrays(folder: Path) -> dict[str, torch.Tensor]:
    """Return the arrays of a scored point."""
    return read_tensors(folder / ARRAYS)


def judge_scores(judges: Sequence[Judge]) -> dict[str, Score]:
    """Return judge name -> comparison."""
    return {judge.name: judge.score for judge in judges}
