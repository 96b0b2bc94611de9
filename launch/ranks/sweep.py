"""One rank of `nd sweep`: choose a point of the grid on training images, then reconstruct the test images."""

from __future__ import annotations

from launch.ranks.evaluate import make_job
from launch.ranks.networks import meet
from launch.ranks.rank import Rank
from nd_dist.evaluation.points.units import control_points, grid_points
from nd_dist.evaluation.run import sweep


def run_sweep(rank: Rank, only_estimate: bool = False) -> None:
    """Take work until the point is chosen and the test images are scored, or until the costs are known."""
    grid = grid_points(rank.config)
    search = make_job(rank, grid, "train")
    report = make_job(rank, (*grid, *control_points(rank.config)))
    sweep(search, report, meet(rank, report.networks.device), rank.events, rank.should_stop, only_estimate)


def work(rank: Rank) -> None:
    """Do the whole sweep."""
    run_sweep(rank)
