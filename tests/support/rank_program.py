"""A rank program whose behaviour the tests choose: ``--behaviour NAME`` before the usual rank arguments."""

import sys
import time

from launch.rank import Rank, run_rank
from nd_dist.errors import DataError, Requeue


def work(rank: Rank) -> None:
    if BEHAVIOUR == "raise" and rank.world.rank == 1:
        raise DataError("A shard is damaged.", where="trials/x.tar")
    if BEHAVIOUR == "crash" and rank.world.rank == 1:
        raise RuntimeError("boom")
    if BEHAVIOUR in ("raise", "crash", "hang"):
        while not rank.should_stop():
            time.sleep(0.05)
        raise Requeue("saved")
    rank.events.progress("sleepy", 1, 1)


if __name__ == "__main__":
    BEHAVIOUR = sys.argv[sys.argv.index("--behaviour") + 1]
    position = sys.argv.index("--behaviour")
    run_rank("sleepy", work, sys.argv[1:position] + sys.argv[position + 2 :])
