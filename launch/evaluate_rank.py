"""One rank of `nd evaluate`: take work until every test image is reconstructed and scored."""

from __future__ import annotations

from launch.networks import device_of
from launch.preflight import decoder_dir
from launch.rank import Rank
from nd_dist.comm import connect
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.networks import ModelFolders
from nd_dist.evaluation.run import evaluate
from nd_dist.evaluation.units import Point, config_points
from shards.reader import ShardReader


def evaluate_points(rank: Rank, points: tuple[Point, ...]) -> None:
    """Reconstruct and score the test images at some guidance points together with the other ranks."""
    config, reader = rank.config, ShardReader(rank.config.shards_dir)
    sources = {name: feature.source for name, feature in reader.index.features.items()}
    job = Job(
        config=config,
        points=points,
        source=reader,
        decoder_dir=decoder_dir(config),
        networks=ModelFolders(config, device_of(rank.world), sources=sources),
    )
    evaluate(job, connect(rank.world), rank.events, rank.should_stop)


def work(rank: Rank) -> None:
    """Reconstruct with and without guidance."""
    evaluate_points(rank, config_points(rank.config))
