"""One rank of the training of the phantom's networks: ``python -m launch.phantom_networks`` starts them."""

from __future__ import annotations

import torch

from launch.ranks.rank import Rank
from launch.recipe import load_settings
from nd_dist.training.engine.engine import connect
from shards.phantom.networks.settings import NETWORKS_YAML, NetworksRecipe, Workplace
from shards.phantom.networks.stages import run_stages


def work(rank: Rank) -> None:
    """Train this rank's share of every step of every network."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())  # CUDA would need settings of the environment
    config, timeout_s = rank.config, rank.config.launch.timeout_s
    rank.use_device()
    gather = connect(rank.world, timeout_s)
    settings = load_settings(NetworksRecipe, config.run_dir / NETWORKS_YAML)
    place = Workplace(config.run_dir, settings, rank.events, rank.world, gather, timeout_s, rank.should_stop)
    run_stages(place)
