"""One rank of a toy evaluation, for the tests: python -m tests.nd_dist.evaluation.eval_rank FOLDER RUN STEPS [R SIZE]

With its rank R and SIZE the ranks need no launcher: they agree on nothing, as all of them find out the same.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from nd_dist.comm import Comm, connect
from nd_dist.evaluation.job import keys_of
from nd_dist.evaluation.run import Worker, evaluate
from nd_dist.events import EventLog
from nd_dist.world import World
from tests.nd_dist.evaluation.toy_world import toy_job

STALE_S = 2.0

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, run, num_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    job = toy_job(folder, run, num_steps=num_steps)
    if sys.argv[4:]:
        comm = Comm()
        comm.rank, comm.size = map(int, sys.argv[4:])
        job, events = dataclasses.replace(job, stale_s=STALE_S), EventLog(job.config.run_dir, comm.rank, "evaluate")
        Worker(comm, events, "together", lambda: False).evaluate(job, keys_of(job))
    else:
        comm = connect(World.from_env(os.environ))
        evaluate(job, comm, EventLog(job.config.run_dir, comm.rank, "evaluate"))
        comm.finish()  # without launch.ranks.rank's guard, mpirun takes a rank that leaves early for a crash
    os._exit(0)
