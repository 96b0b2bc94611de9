"""From judged images on disk to the numbers of one guidance point and subject, read and written.

Features are read once of every judge and repeat, and pictures never. Legend: N images, R repeats, D feature values.
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

from nd_dist.evaluation.points.layout import ARRAYS, FEATURES
from nd_dist.fanout.results import read_record
from nd_dist.frozen.judges import Score
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.distribution import frechet_distance, kernel_distance, kernel_distance_resampled, kernels
from nd_dist.metrics.identification import BLOCK_ROWS, mean_correlation_wins
from nd_dist.metrics.protocols import Protocol
from nd_dist.metrics.statistics.bootstrap import mean_of
from nd_dist.metrics.statistics.scores import ADDED, DRAWS, EACH, RESAMPLED, WINS, Float64, Scored, Scores, Statistics

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class JudgedSheets:
    """Judged images on disk, some in a folder.

    Args:
        folders: Results of ``judge_all``.
    """

    folders: Sequence[Path]

    @cached_property
    def _records(self) -> dict[Path, dict[str, Any]]:
        return {folder: read_record(folder) for folder in self.folders}

    @property
    def judges(self) -> list[str]:
        """Names of the judges whose features are there."""
        with safe_open(self.folders[0] / FEATURES, framework="numpy") as content:
            return list(content.keys())

    def features(self, judge: str, repeat: int, image_ids: Sequence[int]) -> Rows:
        """Return a judge's features (N, D) of one repeat of some images."""
        found, wanted = dict[int, Rows](), set(image_ids)
        for folder, record in self._records.items():
            if wanted.intersection(record["image_ids"]):
                with safe_open(folder / FEATURES, framework="numpy") as content:
                    found |= zip(record["image_ids"], content.get_slice(judge)[repeat], strict=True)
        return np.stack([found[image_id] for image_id in image_ids])

    def metrics(self, image_ids: Sequence[int]) -> dict[str, list[Any]]:
        """Return metric name -> what it is of each image: a number, or one for every repeat."""
        of_image = {
            image_id: {name: values[place] for name, values in record["metrics"].items()}
            for record in self._records.values()
            for place, image_id in enumerate(record["image_ids"])
        }
        return {name: [of_image[image_id][name] for image_id in image_ids] for name in of_image[image_ids[0]]}


@dataclass(frozen=True)
class JudgedImages:
    """Judged images of one point and subject.

    Args:
        recons: Their reconstructions.
        originals: What was seen, maybe of more images.
        image_ids: The N images.
        num_repeats: R.
        device: Where products of features run.
    """

    recons: JudgedSheets
    originals: JudgedSheets
    image_ids: Sequence[int]
    num_repeats: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a value

    def of(self, judge: str, protocol: Protocol) -> tuple[Rows, Iterator[Rows]]:
        """Return a judge's features (N, D) of the originals, and of every repeat that counts."""
        repeats = range(1) if protocol.repeats == "first" else range(self.num_repeats)
        made = (self.recons.features(judge, repeat, self.image_ids) for repeat in repeats)
        return self.originals.features(judge, 0, self.image_ids), made


def score_images(
    judged: JudgedImages, judges: Mapping[str, Score], protocol: Protocol
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what all metrics of a point are made of: ``each.NAME`` (N,) float64 or ``wins.NAME`` (N, N) int32.

    Args:
        judged: The images.
        judges: Judge name -> which comparison its features are for.
        protocol: Distractors and how repeats are reduced.
    """
    for name, values in judged.recons.metrics(judged.image_ids).items():
        yield EACH + name, torch.tensor([_reduced(value, protocol) for value in values], dtype=torch.float64)
    for name, score in judges.items():
        if score == "distance":
            yield EACH + name, torch.from_numpy(_distances(judged, name, protocol))
        elif score == "two_way" and len(judged.image_ids) > 1:
            yield WINS + name, torch.from_numpy(_wins(judged, name, protocol))


def _reduced(value: float | Sequence[float], protocol: Protocol) -> float:
    """Return one number of an image: that of its first repeat, the mean of its repeats, or the one that it has."""
    if not isinstance(value, list):
        return float(value)  # type: ignore[arg-type]  # JSON has no other sequence
    return float(value[0]) if protocol.repeats == "first" else mean_of(np.array(value))


def _distances(judged: JudgedImages, judge: str, protocol: Protocol) -> Float64:
    """Return the correlation distance of each image, mean over the repeats that count."""
    reals_ND, made = judged.of(judge, protocol)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(reals_ND), BLOCK_ROWS)]
    per_repeat = [
        np.concatenate([correlation_distance(reals_ND[rows], recons_ND[rows]) for rows in blocks])
        for recons_ND in made
    ]
    return np.asarray(np.stack(per_repeat).sum(axis=0) / len(per_repeat), dtype=np.float64)


def _wins(judged: JudgedImages, judge: str, protocol: Protocol) -> npt.NDArray[np.int32]:
    """Return (N, N): how many repeats of pair j beat distractor k (1 or 0 where correlations are averaged first)."""
    reals_ND, made = judged.of(judge, protocol)
    sets = [list(made)] if protocol.repeats == "mean_correlation" else ([recons_ND] for recons_ND in made)
    won = [mean_correlation_wins(reals_ND, each, protocol.distractors, judged.device) for each in sets]
    return np.asarray(np.sum(won, axis=0), dtype=np.int32)


def scored_sets(
    judged: JudgedImages, judges: Mapping[str, Score], protocol: Protocol, statistics: Statistics
) -> dict[str, Scored]:
    """Return FID and KID where there is a judge for them: means over the repeats that count.

    FID has no interval here: a resample repeats pictures, which its estimate of covariances does not survive.
    """
    names, num = [name for name, score in judges.items() if score == "distribution"], len(judged.image_ids)
    if not names or num < 2:
        return {}
    reals_ND, made = judged.of(names[0], protocol)
    found, counts_BN = [], statistics.counts(num)
    for recons_ND in made:
        pairs = kernels(reals_ND, recons_ND)
        resampled_B = kernel_distance_resampled(pairs, counts_BN)
        found.append((frechet_distance(reals_ND, recons_ND), kernel_distance(pairs), resampled_B))
    fids, kids, resampled = zip(*found, strict=True)
    kid = Scored(mean_of(np.array(kids)), num, False, np.stack(resampled).mean(axis=0))
    return {"fid": Scored(mean_of(np.array(fids)), num, False), "kid": kid}


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
