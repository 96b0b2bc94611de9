"""One rank of `nd sweep`: choose a point of the grid on training images, then reconstruct the test images."""

from __future__ import annotations

from launch.ranks.evaluate import make_job
from launch.ranks.networks import meet
from launch.ranks.rank import Rank, refuse_to_run
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


if __name__ == "__main__":  # `deepspeed --module` would take a module that does nothing for a success
    refuse_to_run("launch.ranks.sweep")
