"""Image and brain retrieval of a subject: decoded features against the pictures' own. No reconstruction is involved.

Legend: N images, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.evaluation.scoring.score import Statistics
from nd_dist.metrics.bootstrap import interval, mean_of, mean_resampled
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, draw_candidates, image_hits, retrieve

BLOCK_IMAGES = 128


def retrieval_metrics(
    predicted: ImageTargets, true: ImageTargets, name: str, image_ids: Sequence[int], statistics: Statistics
) -> dict[str, Any]:
    """Return ``image_retrieval`` and ``brain_retrieval`` of a subject as JSON.

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
    metrics = {}
    for find, hits in (("image", image_hits(cosines_NN)), ("brain", brain_hits(cosines_NN))):
        found = retrieve(cosines_NN, picks_RK, find=find)
        low, high = found.ci_low, found.ci_high
        if len(picks_RK) == 1:
            values = hits.astype(np.float64)
            resampled = interval(mean_of(values), mean_resampled(values, statistics.counts(num)), num)
            low, high = resampled.ci_low, resampled.ci_high
        metrics[f"{find}_retrieval"] = {
            "value": found.mean,
            "ci_low": low,
            "ci_high": high,
            "n": num,
            "higher_is_better": True,
            "candidates": found.num_candidates,
            "draws": len(picks_RK),
            "target": name,
        }
    return metrics


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
