"""Named groups of test images (held-out objects, say), whose metrics are reported apart from those of all images.

A group's metrics are what an evaluation of these images alone would give: distractors come from the group, and the
resamples are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nd_dist.errors import DataError
from nd_dist.files import read_json
from nd_dist.metrics.statistics.scores import EACH, WINS, Statistics, scored_arrays

Groups = Mapping[str, tuple[int, ...]]


def read_groups(path: Path) -> Groups:
    """Return name -> image ids of a JSON file, in the file's order.

    Raises:
        DataError: the file is missing, or is not an object of lists of image ids.
    """
    if not path.is_file():
        raise DataError(
            "The file that names groups or classes of images is missing.",
            where=str(path),
            todo="fix evaluation.image_groups or evaluation.image_classes, or set it to null",
        )
    content = read_json(path)
    is_groups = isinstance(content, dict) and all(
        isinstance(ids, list) and all(type(image_id) is int and image_id >= 0 for image_id in ids)
        for ids in content.values()
    )
    if not is_groups:
        raise DataError(
            "A file of image groups has another content.",
            where=str(path),
            expected='{"name of the group": [0-based image ids, ...], ...}',
            found=str(content)[:80],
        )
    return {name: tuple(sorted(set(ids))) for name, ids in content.items()}


def group_metrics(
    arrays: Mapping[str, torch.Tensor],
    image_ids: Sequence[int],
    groups: Groups,
    num_repeats: int,
    statistics: Statistics,
) -> dict[str, dict[str, Any]]:
    """Return group name -> metric name -> value, interval, n; groups without any of the images are left out.

    Args:
        arrays: From ``score_images``.
        image_ids: The images that its rows are.
        groups: The groups.
        num_repeats: Repeats summed in the wins.
        statistics: Resamples.
    """
    found = {}
    for name, members in groups.items():
        ids = [image_id for image_id in members if image_id in image_ids]
        if not ids:
            continue
        own = of_images(arrays, image_ids, ids)
        scored = scored_arrays(own, num_repeats, "real", statistics)
        found[name] = {metric: item.as_json() for metric, item in scored.items()}
    return found


def of_images(
    arrays: Mapping[str, torch.Tensor], image_ids: Sequence[int], wanted: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return the arrays of ``score_images`` as if some of the images were all that there are.

    Args:
        arrays: Of all images; other arrays than those of ``score_images`` are left out.
        image_ids: The images that its rows are.
        wanted: Some of them.
    """
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    rows = torch.tensor([row_of[image_id] for image_id in wanted], dtype=torch.int64)
    found = {key: array[rows] for key, array in arrays.items() if key.startswith(EACH)}
    if len(rows) > 1:  # one image has no distractor
        found |= {key: array[rows][:, rows] for key, array in arrays.items() if key.startswith(WINS)}
    return found
