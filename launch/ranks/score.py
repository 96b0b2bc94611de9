"""One rank of `nd score`: judge pictures that were made elsewhere, together with the others."""

from __future__ import annotations

from launch.ranks.networks import meet
from launch.ranks.rank import Rank, refuse_to_run
from nd_dist.evaluation.given import given_job
from nd_dist.evaluation.run import evaluate


def work(rank: Rank) -> None:
    """Take work until every picture is judged and the numbers are written."""
    job = given_job(rank.config, rank.use_device())
    evaluate(job, meet(rank, job.networks.device), rank.events, rank.should_stop)


if __name__ == "__main__":  # `deepspeed --module` would take a module that does nothing for a success
    refuse_to_run("launch.ranks.score")
