"""Test trials in the order of evaluation's units, one at a time: voxels, targets and picture of an image together.

For users' own baselines and scores; at most two images are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nd_dist.schema import Split
from shards.format.codec import PICTURES
from shards.reading.reader import ShardReader


@dataclass(frozen=True)
class Trial:
    """An image that a subject saw.

    Args:
        subject: Subject id.
        image_id: 0-based image id.
        voxels: (V,) z-scored betas, the mean over the subject's repeats of the image.
        num_repeats: How many trials that is.
        targets: Target name -> record (*shape), float32.
        picture: (H, W, 3), 0..255; None where none was asked for.
    """

    subject: int
    image_id: int
    voxels: npt.NDArray[np.float32]
    num_repeats: int
    targets: dict[str, npt.NDArray[np.float32]]
    picture: npt.NDArray[np.uint8] | None


def open_trials(
    reader: ShardReader,
    subjects: Sequence[int],
    split: Split = "test",
    *,
    targets: Sequence[str] = (),
    has_pictures: bool = False,
    sessions: Sequence[int] | None = None,
) -> Iterator[Trial]:
    """Yield every image of a split once a subject, in the order of evaluation's units: subject, then image id.

    Args:
        reader: The shards.
        subjects: Subjects, in the order wanted.
        split: ``test`` or ``train``.
        targets: Targets to read.
        has_pictures: Whether to read the pictures.
        sessions: Only trials of these sessions (none: all).

    Raises:
        DataError: a subject, target or picture was not packed, or a shard is damaged.
    """

    def read(subject: int, image_id: int) -> Trial:
        voxels_NV, counts = reader.voxels_and_repeats(subject, [image_id], sessions)
        return Trial(
            subject=subject,
            image_id=image_id,
            voxels=voxels_NV[0],
            num_repeats=counts[0],
            targets={name: reader.targets(name, [image_id])[0] for name in targets},
            picture=reader.pictures([image_id])[0] if has_pictures else None,
        )

    for name in (*targets, *((PICTURES,) if has_pictures else ())):
        reader.index.feature(name)
    units = [(subject, image_id) for subject in subjects for image_id in reader.images(subject, split, sessions)]
    with ThreadPoolExecutor(1, thread_name_prefix="open-trials") as ahead:
        upcoming: Future[Trial] | None = None
        for unit in units:
            current, upcoming = upcoming, ahead.submit(read, *unit)
            if current is not None:
                yield current.result()
        if upcoming is not None:
            yield upcoming.result()
