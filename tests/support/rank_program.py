"""A rank program whose behaviour the tests choose by its first option."""

import os
import signal
import time

import psutil

from launch.ranks.rank import Rank
from nd_dist.comm import connect
from nd_dist.errors import DataError, Requeue


def work(rank: Rank) -> None:
    behaviour = rank.options[0]
    is_last = rank.world.rank == rank.world.size - 1
    if behaviour == "raise" and is_last:
        raise DataError("A shard is damaged.", where="trials/x.tar")
    if behaviour == "crash" and is_last:
        raise RuntimeError("boom")
    if behaviour == "abort" and is_last:
        os.kill(os.getpid(), signal.SIGABRT)
    if behaviour == "leave" and is_last:  # what MPI_Abort does: no signal, no word
        os.write(1, b"Abort(15) on node 0\n")
        os._exit(int(rank.options[1]))
    if behaviour == "sys-exit" and is_last:
        raise SystemExit("a library had enough")
    if behaviour == "pause" and is_last:
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "kill-launcher" and is_last:
        guard = psutil.Process().parent()
        assert guard is not None
        os.kill(guard.ppid(), signal.SIGKILL)
    if behaviour in ("deaf", "kill-launcher") or (behaviour == "deaf-last" and is_last):
        while True:
            time.sleep(0.05)
    if behaviour == "leave":
        connect(rank.world)
    if behaviour in ("raise", "crash", "hang", "abort", "pause"):
        while not rank.should_stop():
            time.sleep(0.05)
        raise Requeue("saved")
    if behaviour == "environment":
        names = rank.options[1:] or os.environ
        rank.events.write("environment", cwd=os.getcwd(), variables={name: os.environ.get(name) for name in names})
    if behaviour == "meet":
        comm = connect(rank.world)
        rank.events.write("met", ranks=comm.gather(comm.rank))
        comm.finish()
    rank.events.progress("sleepy", 1, 1)
