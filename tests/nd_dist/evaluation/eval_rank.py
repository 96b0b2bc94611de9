"""One rank of a toy evaluation, for the tests: python -m tests.nd_dist.evaluation.eval_rank FOLDER RUN STEPS"""

import os
import sys
from pathlib import Path

import torch

from nd_dist.comm import connect
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog
from nd_dist.world import World
from tests.nd_dist.evaluation.toy_world import toy_job

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, run, num_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    world = World.from_env(os.environ)
    comm = connect(world)
    job = toy_job(folder, run, num_steps=num_steps)
    evaluate(job, comm, EventLog(job.config.run_dir, world.rank, "evaluate"))
    comm.finish()  # without launch.ranks.rank's guard, mpirun takes a rank that leaves early for a crash
    os._exit(0)
