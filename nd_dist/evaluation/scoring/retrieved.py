"""Image and brain retrieval of a subject: decoded features against the pictures' own. No reconstruction is involved.

Legend: N images, L tokens, D width, R draws of candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, draw_candidates, image_hits, retrieve
from nd_dist.metrics.statistics.bootstrap import mean_of, mean_resampled
from nd_dist.metrics.statistics.scores import DRAWS, Scored, Statistics, kept_arrays

BLOCK_IMAGES = 128


def retrieval_metrics(
    predicted: ImageTargets, true: ImageTargets, name: str, image_ids: Sequence[int], statistics: Statistics
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return ``image_retrieval`` and ``brain_retrieval`` of a subject as JSON, and their arrays.

    With more than 300 images: the field's 30 draws of 300 candidates, their mean and normal interval. With fewer, all
    images are candidates and the interval is a bootstrap over images (hits are resampled, candidates are not).

    Args:
        predicted: Decoder's predictions.
        true: The pictures' own targets.
        name: Target that is compared.
        image_ids: The N images.
        statistics: Seed and resamples.
    """
    cosines_NN = _cosines(predicted, true, name, image_ids)
    num = len(image_ids)
    picks_RK = draw_candidates(num, statistics.seed)
    metrics: dict[str, Any] = {}
    arrays: dict[str, torch.Tensor] = {}
    for find, hits in (("image", image_hits(cosines_NN)), ("brain", brain_hits(cosines_NN))):
        key, found = f"{find}_retrieval", retrieve(cosines_NN, picks_RK, find=find)
        if len(picks_RK) == 1:
            values = hits.astype(np.float64)
            scored = Scored(mean_of(values), num, True, mean_resampled(values, statistics.counts(num)), values)
            content, kept = scored.as_json(), kept_arrays({key: scored})
        else:
            content = {**Scored(found.mean, num, True).as_json(), "ci_low": found.ci_low, "ci_high": found.ci_high}
            kept = {DRAWS + key: torch.from_numpy(found.each)}
        chance = 1 / found.num_candidates
        details = {"candidates": found.num_candidates, "draws": len(picks_RK), "chance": chance, "target": name}
        metrics[key] = {**content, **details}
        arrays |= kept
    return metrics, arrays


def _cosines(
    predicted: ImageTargets, true: ImageTargets, name: str, image_ids: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return (N, N) cosines of flattened features, in blocks."""
    blocks = [list(image_ids[start : start + BLOCK_IMAGES]) for start in range(0, len(image_ids), BLOCK_IMAGES)]
    return np.block(
        [
            [cosine_matrix(predicted.rows(name, rows), true.rows(name, columns)) for columns in blocks]
            for rows in blocks
        ]
    )
