"""One rank of `nd score`: judge pictures that were made elsewhere, together with the others."""

from __future__ import annotations

from launch.ranks.networks import device_of
from launch.ranks.rank import Rank
from nd_dist.comm import connect
from nd_dist.evaluation.given import given_job
from nd_dist.evaluation.run import evaluate


def work(rank: Rank) -> None:
    """Take work until every picture is judged and the numbers are written."""
    evaluate(given_job(rank.config, device_of(rank.world)), connect(rank.world), rank.events, rank.should_stop)
