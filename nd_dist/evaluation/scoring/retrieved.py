"""Decoded targets of a subject against the pictures' own: retrieval and correlations. No reconstruction is involved.

Legend: N images, L tokens, D width, R draws of candidates, P numbers of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.errors import DataError
from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, draw_candidates, image_hits, retrieve
from nd_dist.metrics.statistics.bootstrap import mean_of, mean_resampled
from nd_dist.metrics.statistics.scores import DRAWS, Scored, Statistics, kept_arrays
from nd_dist.schema import Role, role_of

BLOCK_IMAGES = 128
CORRELATIONS: dict[Role, str] = {"semantic": "decoded_c", "initial": "decoded_z", "guidance": "decoded_g"}


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


def correlation_metrics(
    predicted: ImageTargets, true: ImageTargets, names: Sequence[str], image_ids: Sequence[int], statistics: Statistics
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return how well c, z and g (mean over its layers) are decoded as JSON, and the arrays of these metrics.

    Of each image the correlation of decoded with true target, both less their mean over the images: what all pictures
    have in common counts for nothing (so of a single image nothing is said).

    Args:
        predicted, true: As for ``retrieval_metrics``.
        names: The decoded targets.
        image_ids: The N images.
        statistics: Seed and resamples.
    """
    of_role: dict[Role, list[npt.NDArray[np.float64]]] = {}
    for name in sorted(names) if len(image_ids) > 1 else ():
        of_role.setdefault(role_of(name), []).append(_correlations(predicted, true, name, image_ids))
    num, scored = len(image_ids), dict[str, Scored]()
    for role, layers in of_role.items():
        values_N = np.mean(layers, axis=0)
        resampled_B = mean_resampled(values_N, statistics.counts(num))
        scored[CORRELATIONS[role]] = Scored(mean_of(values_N), num, True, resampled_B, values_N)
    return {name: item.as_json() for name, item in scored.items()}, kept_arrays(scored)


def _correlations(
    predicted: ImageTargets, true: ImageTargets, name: str, image_ids: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return (N,) correlations of a target's deviations from its mean; 0 where one deviates nowhere.

    Raises:
        DataError: a value is not finite.
    """
    first_NP, second_NP = (targets.rows(name, image_ids).reshape(len(image_ids), -1) for targets in (predicted, true))
    means = [rows_NP.mean(axis=0, dtype=np.float64) for rows_NP in (first_NP, second_NP)]
    found = np.zeros(len(image_ids))
    for row, pair in enumerate(zip(first_NP, second_NP, strict=True)):
        x_P, y_P = (values_P - mean_P for values_P, mean_P in zip(pair, means, strict=True))
        norms = np.sqrt((x_P * x_P).sum() * (y_P * y_P).sum())  # sums of numpy: a BLAS's bits depend on its threads
        found[row] = (x_P * y_P).sum() / norms if norms != 0 else 0.0
    if not np.isfinite(found).all():
        raise DataError(
            f"Decoded or true {name} holds NaN or infinity.",
            where=f"{int((~np.isfinite(found)).sum())} of {len(image_ids)} images",
            todo="look for damage with `nd verify`; remove the run's folder evaluation/decoded and evaluate again",
        )
    return found


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
