"""Correlation distance of feature pairs (EffNet-B and SwAV in the field's table): lower is better.

Legend: N pairs, D feature values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nd_dist.metrics.identification import standardize_rows


def correlation_distance(
    reals_ND: npt.NDArray[np.floating], recons_ND: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Return (N,) 1 - Pearson correlation of each pair, float64 in [0, 2].

    scipy gives NaN where a row is constant; here its correlation counts as 0, so its distance is 1.

    Source: ``scipy.spatial.distance.correlation``, which the field's notebooks average over images.
    """
    correlations_N = (standardize_rows(reals_ND) * standardize_rows(recons_ND)).sum(axis=1)
    return np.asarray(1.0 - correlations_N, dtype=np.float64)
