"""Seeds and counter-based random numbers that depend on the unit of work only.

Nothing here knows rank, batch size or call order, so a result is the same on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def unit_seed(run_seed: int, *words: int | str) -> int:
    """Return a seed in 0..2**63-1 for a named unit of work, e.g. ``unit_seed(seed, "noise", image_id, repeat)``."""
    text = "\x1f".join([str(run_seed), *(f"{type(word).__name__}:{word}" for word in words)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little") >> 1


def splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the splitmix64 finaliser of ``state + golden`` elementwise (uint64 -> uint64).

    Source: Steele, Lea, Flood (2014), "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        mixed = state + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
