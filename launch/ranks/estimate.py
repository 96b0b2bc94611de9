"""One rank of `nd sweep --estimate`: time a few units, say what the whole sweep costs, and stop there."""

from __future__ import annotations

from launch.ranks.rank import Rank
from launch.ranks.sweep import run_sweep


def work(rank: Rank) -> None:
    """Measure; what was made for it counts when the sweep is started."""
    run_sweep(rank, only_estimate=True)
