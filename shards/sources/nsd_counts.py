"""NSD's known counts, to check a full copy against. Sources: NSD data manual, "Technical notes"; published models."""

from __future__ import annotations

from dataclasses import dataclass, replace

NUM_IMAGES = 73_000
TRIALS_PER_SESSION = 750
MAX_REPEATS = 3
ROI = "nsdgeneral"


@dataclass(frozen=True)
class KnownCounts:
    """What one complete subject of NSD holds."""

    sessions: int
    trials: int
    images: int
    test_images: int
    test_trials: int
    voxels: int


KNOWN = {
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
EARLY = {
    subject: replace(KNOWN[subject], sessions=37, trials=27_750, test_images=982, test_trials=2770)
    for subject in (1, 2, 5, 7)
}


def expected_counts(subject: int, found: KnownCounts) -> KnownCounts | None:
    """Return what NSD's subject holds, as far as it is known for the sessions that were found; None for others.

    Args:
        subject: NSD's subject id.
        found: What was counted; numbers that nobody knows for these sessions are taken from here.
    """
    whole, early = KNOWN.get(subject), EARLY.get(subject)
    if whole is None or found.sessions == whole.sessions:
        return whole
    if early is not None and found.sessions == early.sessions:
        return replace(early, images=found.images)
    return replace(found, trials=found.sessions * TRIALS_PER_SESSION, voxels=whole.voxels)
