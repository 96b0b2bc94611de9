"""Agreement of the repeated reconstructions of one picture: the paper's own concern (detail fidelity over repeats).

Legend: R repeats, C = 3 channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

PairMetric = Callable[[Tensor, Tensor], Tensor]


def repeat_agreement(repeats_RCHW: Tensor, metric: PairMetric) -> float:
    """Return the mean of ``metric`` over all R (R - 1) / 2 pairs of repeats.

    Args:
        repeats_RCHW: Reconstructions of one picture, pixels in [0,1].
        metric: Symmetric metric of pairs, (B, C, H, W) x 2 -> (B,), such as ``pixel.pixel_correlation``.

    Raises:
        ValueError: fewer than two repeats.
    """
    pairs = list(combinations(range(len(repeats_RCHW)), 2))
    if not pairs:
        raise ValueError("agreement needs at least two repeats")
    left, right = torch.tensor(pairs).T
    return float(metric(repeats_RCHW[left], repeats_RCHW[right]).mean())
