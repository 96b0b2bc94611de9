"""Cases of the metrics: PixCorr and SSIM, two-way identification, correlation distance, retrieval in both directions.

``default`` resizes with antialias, ``noaa`` without; ``via256`` resizes to 256 pixels first, as the notebook does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nd_dist.conformance.rows import DOUBLE, Case, Row, compare, isolated
from nd_dist.metrics.distance import correlation_distance
from nd_dist.metrics.identification import correlation_matrix, two_way, wins
from nd_dist.metrics.pixel import pixel_correlation, structural_similarity
from nd_dist.metrics.retrieval import brain_hits, cosine_matrix, image_hits, retrieve
from nd_dist.pixels import Resize

ANTIALIAS = {"default": True, "noaa": False}
FIRST_SIZE, PIXEL_SIZE = 256, 425
RESIZED = 1e-5
"""Pictures are resized in float32."""
EXACT = 0.0


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of every ``.npz`` of the folder."""
    for path in sorted(folder.glob("*.npz")):
        yield from isolated(path.name, _check_case(path))


def _check_case(path: Path) -> Iterator[Row]:
    case = Case(path)
    ours = {**_pixels(case), **_identification(case), **_retrieval(case)}
    for quantity in [name for name in case.names if name in ours]:
        value, tolerance = ours[quantity]
        yield compare(case.file, quantity, value, case[quantity], tolerance)
    case.mark_read("versions")  # what made the case; nothing to compare
    yield from case.left_over()


Ours = dict[str, tuple[Any, float]]  # Any: numbers and arrays of several libraries


def _pixels(case: Case) -> Ours:
    if not case.has("images_u8", "recons_u8"):
        return {}
    images, recons = (case.tensor(name).float() / 255.0 for name in ("images_u8", "recons_u8"))
    ours: Ours = {}
    for kind, antialias in ANTIALIAS.items():
        first, pixels = Resize(FIRST_SIZE, antialias=antialias), Resize(PIXEL_SIZE, antialias=antialias)
        direct = pixels(recons), pixels(images)
        via = pixels(first(recons)), pixels(first(images))
        for name, metric in (("pixcorr", pixel_correlation), ("ssim", structural_similarity)):
            each = metric(*direct)
            ours[f"{name}_each_{kind}"] = (each, RESIZED)
            ours[f"{name}_{kind}"] = (each.mean(), RESIZED)
            ours[f"{name}_via256_{kind}"] = (metric(*via).mean(), RESIZED)
    return ours


def _identification(case: Case) -> Ours:
    if not case.has("feat_real", "feat_pred"):
        return {}
    reals, recons = (case[name].reshape(len(case[name]), -1) for name in ("feat_real", "feat_pred"))
    correlations = correlation_matrix(reals, recons)
    distances = correlation_distance(reals, recons)
    return {
        "two_way_counts": (wins(correlations, "real").sum(axis=0), EXACT),
        "two_way_den": (len(reals) - 1, EXACT),
        "two_way": (two_way(correlations), DOUBLE),
        "two_way_layer_dict": (two_way(correlations), DOUBLE),
        "corr_distance_each": (distances, DOUBLE),
        "corr_distance": (distances.mean(), DOUBLE),
    }


def _retrieval(case: Case) -> Ours:
    """Return retrieval; the released "fwd" is given the image find the brain, "bwd" the other direction."""
    if not case.has("ret_picks", "ret_clip", "ret_brain"):
        return {}
    images, brains, picks = case["ret_clip"], case["ret_brain"], case["ret_picks"]
    cosines = cosine_matrix(brains, images)
    first = cosines[np.ix_(picks[0], picks[0])]
    ours: Ours = {
        "naive_given_brain_find_image": (image_hits(first).mean(), DOUBLE),
        "naive_given_image_find_brain": (brain_hits(first).mean(), DOUBLE),
    }
    for name, find in (("fwd", "brain"), ("bwd", "image")):
        found = retrieve(cosines, picks, find=find)
        ours[f"ret_{name}_each"] = (found.each, DOUBLE)
        ours[f"ret_{name}"] = (found.mean, DOUBLE)
        ours[f"ret_{name}_ci"] = (torch.tensor([found.ci_low, found.ci_high], dtype=torch.float64), DOUBLE)
    return ours
