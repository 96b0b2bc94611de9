"""What DeepSpeed, MPI and torch do wrong around launches, reproduced, and that nd_dist does not fall into it.

Trap 8 (what pdsh makes of words) needs hosts: ``tests/cluster/test_traps.py``.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.plans.deepspeed import deepspeed_plan
from launch.plans.environment import environment
from launch.plans.hosts import Host
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram
from launch.plans.tools import find_tools
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher
from nd_dist.checkpoint import read_manifest, read_pointer
from nd_dist.config import Config
from nd_dist.errors import RankFailure
from tests.ranks.launching import free_port
from tests.ranks.recipe import small_recipe
from tests.support.rank_processes import assert_gone, rank_pids
from tests.support.waiting import HANG_S, wait_until

pytestmark = pytest.mark.launch
PLAIN = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def python(code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], env={**PLAIN, **variables}, capture_output=True, text=True,
        timeout=HANG_S, check=False,
    )  # fmt: skip


GROUPS = """
import json, sys
from datetime import timedelta
import deepspeed, torch
from torch.distributed import HashStore, distributed_c10d, init_process_group
from nd_dist.training.engine.engine import bound_waits

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
limit = timedelta(seconds=20)
init_process_group("gloo", rank=0, world_size=1, store=HashStore(), timeout=limit)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, timeout=limit)
model = torch.nn.Linear(2, 2)
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config={
    "train_batch_size": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True})

def limits():
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

before = limits()
bound_waits(20)
print(json.dumps([before, limits()]))
"""


def test_trap_1_deepspeeds_own_groups_ignore_the_timeout_until_it_is_put_on_each(tmp_path: Path) -> None:
    result = python(GROUPS, LOCAL_RANK="0")
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout.splitlines()[-1])
    assert max(before) == 1800
    assert set(after) == {20}


TORN = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from nd_dist.errors import NdDistError
from nd_dist.events import EventLog
from nd_dist.training import checkpoints
from nd_dist.training.run import train
from nd_dist.config import Config
from nd_dist.world import World
from tests.ranks.synthetic import SyntheticSource

world, keeps_latest = World.from_env(os.environ), sys.argv[2] == "plain"
saves = 0
original = checkpoints.save_state

def save(engine, folder, tag):
    global saves
    saves += 1
    inner = engine.deepspeed.checkpoint_engine
    write = inner.save
    def slow(*words, **options):
        if saves == 2 and world.rank == 1:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*words, **options)
    inner.save = slow
    if keeps_latest:
        engine.deepspeed.save_checkpoint(str(folder), tag=tag)
    else:
        original(engine, folder, tag)

checkpoints.save_state = save
torch.set_num_threads(1)
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
source = SyntheticSource(world.rank, world.size, -1, 0)
try:
    train(config, world, source, EventLog(config.run_dir, world.rank, "train"), lambda: False)
except (NdDistError, RuntimeError):
    os._exit(4)
os._exit(0)
"""


@pytest.mark.slow
def test_trap_2_a_rank_killed_while_saving_tears_deepspeeds_latest_but_not_ours(tmp_path: Path) -> None:
    stages = {}
    for how in ("plain", "ours"):
        recipe = small_recipe(tmp_path / how, stages=(1,))
        path = tmp_path / f"{how}.json"
        path.write_text(recipe.model_dump_json())
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **PLAIN}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", TORN, str(path), how],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        try:
            assert [rank.wait(HANG_S) for rank in ranks][1] == -signal.SIGKILL
        finally:
            for rank in ranks:
                rank.kill()
        stages[how] = recipe.run_dir / "checkpoints" / "stage1"
    torn = (stages["plain"] / "latest").read_text()
    assert torn == "step-0000004"
    assert not list((stages["plain"] / torn).glob("*zero_pp_rank_1*"))  # named as the latest, and not whole
    assert read_pointer(stages["ours"]) == "step-0000002"
    assert read_manifest(stages["ours"] / "step-0000002")["step"] == 2


def test_traps_3_and_4_deepspeed_says_0_for_a_job_without_launcher_and_nd_neither_believes_it_nor_leaves_ranks(
    config: Config,
) -> None:
    program = RankProgram("tests.support.rank_program", config.run_dir / "config.yaml", "L", ("kill-launcher",))
    runner = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()))
    words = ("--no_local_rank", "--module", RANK_MODULE, *program.arguments)
    plan = LaunchPlan((*runner, *words), {}, 2)
    with pytest.raises(RankFailure, match="exit code 0 of the launcher") as caught:
        run_plan(Launch("rank_program", config.run_dir, "L", plan), Watcher(Console()), environment())
    assert caught.value.exit_code == 4
    assert len(rank_pids(config, 2)) == 2
    assert_gone(rank_pids(config, 2))


def test_trap_4_sigterm_to_plain_deepspeed_leaves_its_ranks_running(tmp_path: Path) -> None:
    script, started = tmp_path / "sleeper.py", tmp_path / "pid"
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(started)!r} + '.part').write_text(str(os.getpid()))\n"
        f"os.rename({str(started)!r} + '.part', {str(started)!r})\ntime.sleep({2 * HANG_S})\n"
    )
    words = ["--num_gpus", "1", "--master_port", str(free_port()), "--no_local_rank", str(script)]
    runner = subprocess.Popen([sys.executable, "-m", "deepspeed.launcher.runner", *words], env=PLAIN)
    wait_until(started.exists)
    orphan = psutil.Process(int(started.read_text()))
    above = orphan.parent()
    try:
        runner.terminate()
        runner.wait(HANG_S)
        time.sleep(2)
        assert orphan.is_running()  # that nd leaves none is tested in test_run and tests/cluster/test_failures
    finally:
        for process in (above, orphan):
            if process is not None:
                process.kill()


def test_trap_5_tasks_that_no_mpi_wired_up_are_worlds_of_one_which_connect_refuses() -> None:
    code = (
        "import os\nfrom mpi4py import MPI\nprint('size', MPI.COMM_WORLD.size, flush=True)\n"
        "from nd_dist.comm import connect\nfrom nd_dist.world import World\nconnect(World.from_env(os.environ))\n"
    )
    for task in range(2):  # what `srun --mpi=none -n 2` sets; tests/cluster/test_slurm has the real one
        result = python(code, SLURM_PROCID=str(task), SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID=str(task))
        assert result.stdout.splitlines() == ["size 1"]
        assert result.returncode != 0
        assert "MPI does not see the ranks that the launcher started" in result.stderr


JOIN = """
import sys
from datetime import timedelta
from torch import distributed
print("begin", flush=True)
if sys.argv[1] == "plain":
    import deepspeed
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
else:
    from nd_dist.training.engine.engine import connect
    from nd_dist.world import World
    connect(World(), 60)
print("joined", flush=True)
"""


@pytest.mark.slow
def test_trap_6_a_lock_left_by_a_killed_build_hangs_deepspeed_but_not_nd(tmp_path: Path) -> None:
    for name in ("shm_comm", "deepspeed_shm_comm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    bin_dir = Path(sys.executable).parent
    variables = {**PLAIN, "TORCH_EXTENSIONS_DIR": str(tmp_path), "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
                 "DS_ACCELERATOR": "cpu", "PATH": f"{bin_dir}:{PLAIN['PATH']}"}  # fmt: skip
    ours = subprocess.run([sys.executable, "-c", JOIN, "ours"], env=variables, capture_output=True, text=True,
                          timeout=HANG_S, check=False)  # fmt: skip
    assert "joined" in ours.stdout, ours.stderr
    plain = subprocess.Popen([sys.executable, "-c", JOIN, "plain"], env=variables, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE)  # fmt: skip
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            plain.communicate(timeout=60)
    finally:
        plain.kill()
    assert "joined" not in plain.communicate()[0]


def test_trap_7_deepspeed_has_no_elasticity_any_more_and_nd_asks_for_none() -> None:
    code = (
        "import sys\nfrom deepspeed.launcher.runner import parse_args\n"
        "try:\n    parse_args(['--elastic_training', 'x.py'])\nexcept SystemExit:\n    print('refused')\n"
        "import importlib.util\nprint(importlib.util.find_spec('deepspeed.elasticity'))\n"
        "from nd_dist.config import TrainingConfig\nfrom nd_dist.training.parameters import deepspeed_config\n"
        "assert 'elasticity' not in deepspeed_config(TrainingConfig(), 4, 2)\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["refused", "None"]
    program = RankProgram("launch.ranks.train", Path("/c.yaml"), "L")
    plan = deepspeed_plan(program, find_tools(), {}, (Host("a", 1),), "deepspeed-pdsh")
    assert not any("elastic" in word for word in plan.argv)
