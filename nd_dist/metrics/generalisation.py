"""Does a decoder reconstruct what was seen, or retrieve what it was trained on? And how much worse is it elsewhere?

A reconstruction of a picture that retrieves is nearer to some training picture than to the one that was seen. Decoded
features that vary along fewer directions than true ones come from a few kinds of pictures. Legend: N test pictures, T
training pictures, D feature values, G pictures of a group, B resamples.

Source of the questions: Shirakawa and others (2024), "Spurious reconstruction from brain activity" (arXiv 2405.10078).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.metrics.identification import Distractors, standardize_rows
from nd_dist.metrics.statistics.bootstrap import mean_of, mean_resampled, percentiles, two_way_added
from nd_dist.metrics.statistics.scores import EACH, WINS, Float64, Scored, Statistics
from nd_dist.metrics.table import metric_of

KEY, ALL = "generalisation", "all images"
"""What is found of a point stands under ``KEY`` in metrics.json, by group of pictures and for ``ALL`` of them."""
BLOCK_ROWS = 1024
TO_SEEN, NEARER = "to_seen", "nearer_to_seen"
TO_TRAINED, SEEN_TO_TRAINED = "to_nearest_trained", "seen_to_nearest_trained"


def nearest_similarity(rows_ND: npt.NDArray[np.floating], trained_TD: npt.NDArray[np.floating]) -> Float64:
    """Return (N,) the largest correlation of each row with a training picture's features."""
    best_N = np.full(len(rows_ND), -np.inf)
    own_ND = standardize_rows(rows_ND)
    for start in range(0, len(trained_TD), BLOCK_ROWS):
        block_ND = standardize_rows(trained_TD[start : start + BLOCK_ROWS])
        best_N = np.maximum(best_N, (own_ND @ block_ND.T).max(axis=1))
    return best_N


def similarities(
    recons: Sequence[npt.NDArray[np.floating]],
    seen_ND: npt.NDArray[np.floating],
    trained_TD: npt.NDArray[np.floating],
) -> dict[str, Float64]:
    """Return what says of each picture whether it was reconstructed or retrieved, each (N,), means over repeats.

    ``to_seen``, ``to_nearest_trained``: correlation of the reconstruction's features with those of the picture that
    was seen, and with the nearest training picture's. ``seen_to_nearest_trained``: the same of the picture that was
    seen, which a perfect reconstruction would reach. ``nearer_to_seen``: share of repeats that are nearer to the
    picture that was seen than to any training picture.

    Args:
        recons: Features (N, D) of each repeat.
        seen_ND: Features of the pictures that were seen.
        trained_TD: Features of the training pictures.
    """
    seen, per_repeat = standardize_rows(seen_ND), []
    for recon_ND in recons:
        to_seen_N = (standardize_rows(recon_ND) * seen).sum(axis=1)
        to_trained_N = nearest_similarity(recon_ND, trained_TD)
        per_repeat.append(np.stack([to_seen_N, to_trained_N, to_seen_N > to_trained_N]))
    means = np.stack(per_repeat).sum(axis=0) / len(per_repeat)
    found = dict(zip((TO_SEEN, TO_TRAINED, NEARER), means, strict=True))
    return {**found, SEEN_TO_TRAINED: nearest_similarity(seen_ND, trained_TD)}


def per_image(arrays: Mapping[str, torch.Tensor], num_repeats: int, distractors: Distractors) -> dict[str, Float64]:
    """Return metric -> what each image adds to it (N,); two-way identification has all test pictures as distractors.

    Args:
        arrays: From ``score_images``.
        num_repeats: Repeats summed in the wins.
        distractors: Whose features were the distractors of the wins.
    """
    found = {}
    for key, array in arrays.items():
        if key.startswith(EACH):
            found[key.removeprefix(EACH)] = array.numpy()
        elif key.startswith(WINS):
            found[key.removeprefix(WINS)] = two_way_added(array.numpy(), distractors, num_repeats)
    return found


def scored_means(
    each: Mapping[str, Float64], rows: npt.NDArray[np.integer], statistics: Statistics
) -> dict[str, Scored]:
    """Return the means of values by image (N,) over some pictures, with intervals over them."""
    counts_BG = statistics.counts(len(rows))
    return {
        name: Scored(mean_of(each_N[rows]), len(rows), _is_better_up(name), mean_resampled(each_N[rows], counts_BG))
        for name, each_N in each.items()
    }


def drops(each: Mapping[str, Float64], rows: npt.NDArray[np.integer], statistics: Statistics) -> dict[str, Scored]:
    """Return how far a group's means lie from those of all other pictures: group minus the others.

    Args:
        each: Metric -> value by image (N,).
        rows: Rows of the group.
        statistics: Resamples; group and others are drawn apart.
    """
    apart, found = Statistics(statistics.num_resamples, statistics.seed + 1), {}
    for name, each_N in each.items():
        own_G, others = each_N[rows], np.delete(each_N, rows)
        own_B = mean_resampled(own_G, statistics.counts(len(own_G)))
        resampled_B = own_B - mean_resampled(others, apart.counts(len(others)))
        num, value = min(len(own_G), len(others)), mean_of(own_G) - mean_of(others)
        found[name] = Scored(value, num, _is_better_up(name), resampled_B)
    return found


def _is_better_up(name: str) -> bool:
    return name != TO_TRAINED and metric_of(name, higher_is_better=True).higher_is_better


def unpaired_difference(
    first: tuple[float, Float64, int], second: tuple[float, Float64, int]
) -> tuple[float, float | None, float | None]:
    """Return the difference of a metric between different sets of pictures (first minus second), and its interval.

    Args:
        first, second: Value, resampled values (B,), number of pictures.
    """
    shuffled_B = np.random.Generator(np.random.PCG64(0)).permutation(second[1])  # equal numbers have equal draws
    low, high = percentiles(first[1] - shuffled_B, min(first[2], second[2]))
    return first[0] - second[0], low, high


def effective_dimension(features_ND: npt.NDArray[np.floating]) -> float:
    """Return along how many directions features vary: the participation ratio of their covariance's eigenvalues.

    It lies between 1 and N - 1; 0 where nothing varies.
    """
    rows_ND = np.asarray(features_ND, dtype=np.float64).reshape(len(features_ND), -1)
    rows_ND = rows_ND - rows_ND.mean(axis=0)
    gram_NN = rows_ND @ rows_ND.T
    total = float(np.square(gram_NN).sum())
    return float(np.trace(gram_NN)) ** 2 / total if total > 0 else 0.0
