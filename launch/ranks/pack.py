"""One rank of `nd pack`: load the frozen networks, then take part in packing."""

from __future__ import annotations

from launch.ranks.networks import load_extractor, meet
from launch.ranks.rank import Rank, interrupt_on_stop, refuse_to_run


def work(rank: Rank) -> None:
    """Pack this rank's share of the shards; rank 0 writes the index last."""
    from shards.packing.pack import pack

    interrupt_on_stop()  # every finished shard is kept, so there is nothing to save
    device = rank.use_device()
    comm = meet(rank, device)
    pack(rank.config, comm, rank.events, load_extractor(rank.config, device))
    comm.finish()


if __name__ == "__main__":  # `deepspeed --module` would take a module that does nothing for a success
    refuse_to_run("launch.ranks.pack")
