"""What ranks that run frozen networks begin with: each other, and the networks on their device."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from nd_dist.comm import Comm, connect
from nd_dist.config import Config
from nd_dist.schema import role_of

if TYPE_CHECKING:
    import torch

    from launch.ranks.rank import Rank
    from nd_dist.frozen.extractor import FrozenExtractor


def meet(rank: Rank, device: torch.device) -> Comm:
    """Return the ranks of this launch; those that compute on one GPU get equal parts of its memory.

    Raises:
        WorldError: see ``nd_dist.comm.connect``.
    """
    import torch

    comm, is_gpu = connect(rank.world), device.type == "cuda"
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid) if is_gpu else "cpu")
    everyone = comm.broadcast(comm.gather(mine))
    if is_gpu:
        torch.cuda.set_per_process_memory_fraction(1 / everyone.count(mine), device)
    return comm


def load_extractor(config: Config, device: torch.device) -> FrozenExtractor:
    """Return what makes the recipe's targets from pictures and captions, with the networks that these need.

    Raises:
        CheckpointError: a model folder is missing or incomplete.
        DataError: a receipt of the shards is damaged.
    """
    from nd_dist.compute.device import DTYPES
    from nd_dist.frozen import stable_diffusion
    from nd_dist.frozen.extractor import FrozenExtractor
    from nd_dist.frozen.vision_tower import load_guidance_network
    from shards.packing.receipts import read_receipts

    dtype, roles = DTYPES[config.frozen.dtype], {role_of(name) for name in config.data.targets}
    parts = [part for role, part in (("semantic", "text_encoder"), ("initial", "vae")) if role in roles]
    sd = stable_diffusion.load(config.model, dtype, device, parts)
    clip = load_guidance_network(config, dtype, device)
    made_by = [receipt.recipe.get("extractor", {}) for receipt in read_receipts(config.shards_folder).values()]
    recorded = {str(value) for fingerprint in made_by for value in fingerprint.values()}
    return FrozenExtractor(sd, clip, config.frozen, config.seed, recorded)
