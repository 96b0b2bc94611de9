"""One rank of the training of the phantom's networks: ``python -m launch.phantom_networks`` starts them."""

from __future__ import annotations

import torch

from launch.ranks.rank import Rank
from nd_dist.training.engine.engine import connect
from shards.phantom.networks.stages import run_stages
from shards.phantom.networks.workplace import Workplace


def work(rank: Rank) -> None:
    """Train this rank's share of every step of every network."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())  # CUDA would need settings of the environment
    config, timeout_s = rank.config, rank.config.launch.timeout_s
    gather = connect(rank.world, timeout_s)
    place = Workplace(
        config.run_dir, config.phantom_networks, rank.events, rank.world, gather, timeout_s, rank.should_stop
    )
    run_stages(place)
