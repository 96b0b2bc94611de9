"""Agreement of the repeated reconstructions of one picture: the paper's own concern (detail fidelity over repeats).

Legend: R repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

PairMetric = Callable[[int, int], float]


def repeat_agreement(num_repeats: int, metric: PairMetric) -> float:
    """Return the mean of a metric over all R (R - 1) / 2 pairs of repeats.

    Args:
        num_repeats: R reconstructions of one picture.
        metric: Symmetric metric of two of them by position, such as ``pixel.PictureSet.correlation``.

    Raises:
        ValueError: fewer than two repeats.
    """
    pairs = list(combinations(range(num_repeats), 2))
    if not pairs:
        raise ValueError("agreement needs at least two repeats")
    return math.fsum(metric(left, right) for left, right in pairs) / len(pairs)
