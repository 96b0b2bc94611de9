"""The order of trials: a pure function of (seed, step) that does not know how many ranks or threads read.

Every subject is an endless stream: its trials permuted for pass 0, then for pass 1, and so on. Step ``t`` takes items
``t q .. (t+1) q`` of the stream of every subject (``q``: its quota). Its rows are numbered over all subjects, and rank
``r`` of ``W`` takes rows ``r``, ``r + W``, ``r + 2 W``, ... So every pass visits every trial once, no rank runs out,
subjects of unequal size need no padding, and any ``W`` gives the same global batch; ranks beyond its rows have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nd_dist.errors import ConfigError
from nd_dist.seeds import splitmix64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permutation(seed: int, subject: int, pass_index: int, length: int) -> npt.NDArray[np.int64]:
    """Return the order in which pass ``pass_index`` visits ``length`` trials of a subject: (length,) positions.

    The keys are the outputs of a splitmix64 generator whose state is folded from (seed, subject, pass); a stable
    sort of them is the order. No library's random stream is involved, so the order survives upgrades.
    """
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in (seed, subject, pass_index):
            state = splitmix64(state + np.uint64(word))
        keys = splitmix64(state + np.arange(length, dtype=np.uint64) * _GOLDEN)
    return np.argsort(keys, kind="stable").astype(np.int64)


@lru_cache(maxsize=64)
def _cached_permutation(seed: int, subject: int, pass_index: int, length: int) -> npt.NDArray[np.int64]:
    """Return ``permutation`` from memory while a pass lasts; the array is read-only because it is shared."""
    order = permutation(seed, subject, pass_index, length)
    order.flags.writeable = False
    return order


def stream_items(seed: int, subject: int, length: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return items ``start .. stop-1`` of a subject's endless stream: positions in 0 .. length-1."""
    items = np.empty(stop - start, dtype=np.int64)
    done = start
    while done < stop:
        pass_index, first = divmod(done, length)
        count = min(stop - done, length - first)
        order = _cached_permutation(seed, subject, pass_index, length)
        items[done - start : done - start + count] = order[first : first + count]
        done += count
    return items


@dataclass(frozen=True)
class SubjectSlice:
    """What one rank reads of one subject in one step.

    Args:
        subject: Subject id.
        positions: (b,) positions in the subject's list of trials.
        sample_ids: (b,) positions of these rows in the global batch.
    """

    subject: int
    positions: npt.NDArray[np.int64]
    sample_ids: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of a stream.

    Args:
        seed: Seed of the permutations.
        subjects: Subject ids, in batch order.
        lengths: Trials of each subject.
        quotas: Trials of each subject in one global step.

    Raises:
        ConfigError: a subject has no trials, or a quota is not positive.
    """

    seed: int
    subjects: tuple[int, ...]
    lengths: tuple[int, ...]
    quotas: tuple[int, ...]

    def __post_init__(self) -> None:
        for subject, length, quota in zip(self.subjects, self.lengths, self.quotas, strict=True):
            if length < 1 or quota < 1:
                raise ConfigError(
                    "A stream needs at least one trial and a positive quota of every subject.",
                    where=f"subject {subject}",
                    found=f"{length} trials, quota {quota}",
                )

    def slices(self, step: int, rank: int, world_size: int) -> Sequence[SubjectSlice]:
        """Return what ``rank`` of ``world_size`` reads in global step ``step``, subject by subject; may be nothing."""
        slices, base = [], 0
        for subject, length, quota in zip(self.subjects, self.lengths, self.quotas, strict=True):
            items = stream_items(self.seed, subject, length, step * quota, (step + 1) * quota)
            own = slice((rank - base) % world_size, None, world_size)
            slices.append(SubjectSlice(subject, items[own], np.arange(base, base + quota, dtype=np.int64)[own]))
            base += quota
        return slices
