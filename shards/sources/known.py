"""Counts of published data sets, to check a copy against.

Sources: NSD data manual, "Technical notes"; published models; LAION-fMRI's documentation ("Experimental design").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

NSD_IMAGES = 73_000
NSD_TRIALS_PER_SESSION = 750


@dataclass(frozen=True)
class KnownCounts:
    """What one subject holds."""

    sessions: int
    trials: int
    images: int
    test_images: int
    test_trials: int
    voxels: int


NSD = {
    1: KnownCounts(40, 30_000, 10_000, 1000, 3000, 15_724),
    2: KnownCounts(40, 30_000, 10_000, 1000, 3000, 14_278),
    3: KnownCounts(32, 24_000, 9411, 930, 2371, 15_226),
    4: KnownCounts(30, 22_500, 9209, 907, 2188, 13_153),
    5: KnownCounts(40, 30_000, 10_000, 1000, 3000, 13_039),
    6: KnownCounts(32, 24_000, 9411, 930, 2371, 17_907),
    7: KnownCounts(40, 30_000, 10_000, 1000, 3000, 12_682),
    8: KnownCounts(30, 22_500, 9209, 907, 2188, 14_386),
}

# the release before August 2023 held the first 37 sessions of the complete subjects
NSD_EARLY = {
    subject: replace(NSD[subject], sessions=37, trials=27_750, test_images=982, test_trials=2770)
    for subject in (1, 2, 5, 7)
}


LAION_FMRI_TEST_TRIALS = {1: 13_013, 3: 13_012, 5: 13_013, 6: 13_012, 7: 13_014}


@dataclass(frozen=True)
class KnownDataSet:
    """A published data set.

    Args:
        name: What people call it.
        most_repeats: How often a subject saw an image at most.
        expected: (subject, what was counted) -> what it holds, as far as that is known; None where it is not.
    """

    name: str
    most_repeats: int
    expected: Callable[[int, KnownCounts], KnownCounts | None]


def known_data_set(num_images: int, source: Mapping[str, object], roi: object) -> KnownDataSet | None:
    """Return the published data set that shards were packed from, None where it is another, or a part of its images.

    Args:
        num_images: Image ids of the data set.
        source: What identifies it (``DatasetReader.source``).
        roi: The ROI whose voxels were packed.
    """
    if num_images == NSD_IMAGES and roi == "nsdgeneral":
        return KnownDataSet("NSD", 3, nsd_counts)
    if num_images == 25_052 and source.get("reader") == "laion_fmri":
        return KnownDataSet("LAION-fMRI", 12, laion_fmri_counts)
    return None


def laion_fmri_counts(subject: int, found: KnownCounts) -> KnownCounts | None:
    """Return what a subject of LAION-fMRI holds in all 30 sessions; of fewer nothing is known (sessions differ)."""
    if subject not in LAION_FMRI_TEST_TRIALS or found.sessions != 30:
        return None
    return KnownCounts(30, 31_856, 6204, 1492, LAION_FMRI_TEST_TRIALS[subject], found.voxels)


def nsd_counts(subject: int, found: KnownCounts) -> KnownCounts | None:
    """Return what NSD's subject holds, as far as it is known for the sessions that were found; None for others.

    Args:
        subject: NSD's subject id.
        found: What was counted; numbers that nobody knows for these sessions are taken from here.
    """
    whole, early = NSD.get(subject), NSD_EARLY.get(subject)
    if whole is None or found.sessions == whole.sessions:
        return whole
    if early is not None and found.sessions == early.sessions:
        return replace(early, images=found.images)
    return replace(found, trials=found.sessions * NSD_TRIALS_PER_SESSION, voxels=whole.voxels)
