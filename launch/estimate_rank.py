"""One rank of `nd sweep --estimate`: time a few units, say what the whole sweep costs, and stop there."""

from __future__ import annotations

from launch.rank import Rank
from launch.sweep_rank import run_sweep


def work(rank: Rank) -> None:
    """Measure; what was made for it counts when the sweep is started."""
    run_sweep(rank, only_estimate=True)
