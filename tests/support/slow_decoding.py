"""A rank of the toy evaluation whose decoder takes its time; everything else that takes long gives signs of life."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from launch.ranks.rank import Rank


@contextmanager
def signs_of_life(rank: Rank, wanted: threading.Event) -> Iterator[None]:
    """Write an event every second while they are wanted: a busy machine takes long to start a rank."""
    over = threading.Event()

    def write() -> None:
        while not over.wait(1):
            if wanted.is_set():
                rank.events.write("busy")

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def work(rank: Rank) -> None:
    wanted = threading.Event()
    wanted.set()
    with signs_of_life(rank, wanted):
        from tests.nd_dist.evaluation.slow_world import evaluate_slowly

        evaluate_slowly(rank, wanted)
