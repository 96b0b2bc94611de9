"""One rank of `nd sweep`: the same work as `nd evaluate`, at every point of the kappa x eta grid."""

from __future__ import annotations

from launch.evaluate_rank import evaluate_points
from launch.rank import Rank
from nd_dist.evaluation.units import grid_points


def work(rank: Rank) -> None:
    """Reconstruct at every point of the grid."""
    evaluate_points(rank, grid_points(rank.config))
