"""NSD's known counts, to check a full copy against. Sources: NSD data manual, "Technical notes"; published models."""

from __future__ import annotations

from dataclasses import dataclass

NUM_IMAGES = 73_000
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
