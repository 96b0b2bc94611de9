"""Controls: reconstructions that bound what a number can mean.

``shuffled``: the sampler is given another image's decoded targets, so every metric falls to chance unless something
leaks. ``nearest``: the training picture whose features are nearest to what was decoded, with no generation at all.
``ceiling``: the picture's own targets. Legend: N images, D feature values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nd_dist.evaluation.reconstruction.decode import ImageTargets
from nd_dist.metrics.retrieval import cosine_matrix
from nd_dist.seeds import unit_seed

BLOCK_IMAGES = 128


def shuffled_images(image_ids: Sequence[int], seed: int) -> dict[int, int]:
    """Return image -> image whose targets it is given: one cycle through all images in an order drawn from the seed.

    A cycle, because a plain permutation would leave about one image its own.
    """
    order = sorted(image_ids, key=lambda image_id: unit_seed(seed, "shuffled", image_id))
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


class ShuffledTargets:
    """Targets of other images.

    Args:
        targets: The targets.
        source_of: Image -> image whose targets it gets.
    """

    def __init__(self, targets: ImageTargets, source_of: Mapping[int, int]) -> None:
        self._targets, self._source_of = targets, source_of

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target of each image's stand-in."""
        return self._targets.rows(name, [self._source_of[image_id] for image_id in image_ids])


def nearest_images(
    predicted: ImageTargets, true: ImageTargets, name: str, image_ids: Sequence[int], candidates: Sequence[int]
) -> Iterator[dict[int, int]]:
    """Yield image -> candidate whose true target has the largest cosine with the image's prediction, block by block.

    After every block of candidates it is the nearest so far; the last one is the answer.

    Args:
        predicted: Decoder's predictions for the N images.
        true: Targets of the candidates.
        name: Target that is compared.
        image_ids: The images.
        candidates: Training images; of equal ones the first wins.
    """
    best_N = np.full(len(image_ids), -np.inf)
    chosen_N = np.zeros(len(image_ids), dtype=np.int64)
    predictions = [
        (start, predicted.rows(name, image_ids[start : start + BLOCK_IMAGES]))
        for start in range(0, len(image_ids), BLOCK_IMAGES)
    ]
    for first in range(0, len(candidates), BLOCK_IMAGES):
        block = candidates[first : first + BLOCK_IMAGES]
        features = true.rows(name, block)
        for start, rows in predictions:
            cosines = cosine_matrix(rows, features)
            place, value = cosines.argmax(axis=1), cosines.max(axis=1)
            part = slice(start, start + len(rows))
            is_better = value > best_N[part]
            best_N[part] = np.where(is_better, value, best_N[part])
            chosen_N[part] = np.where(is_better, np.asarray(block)[place], chosen_N[part])
        yield dict(zip(image_ids, chosen_N.tolist(), strict=True))
