"""Agreement of the repeated reconstructions of one picture: the paper's own concern (detail fidelity over repeats).

Legend: R repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

Item = TypeVar("Item")


def repeat_agreement(repeats: Sequence[Item], metric: Callable[[Item, Item], float]) -> float:
    """Return the mean of a metric over all R (R - 1) / 2 pairs of repeats.

    Args:
        repeats: R reconstructions of one picture.
        metric: Symmetric metric of two of them, such as ``pixel.Picture.correlation``.

    Raises:
        ValueError: fewer than two repeats.
    """
    pairs = list(combinations(repeats, 2))
    if not pairs:
        raise ValueError("agreement needs at least two repeats")
    return math.fsum(metric(left, right) for left, right in pairs) / len(pairs)
