"""Plans of ``rank_program`` with real launchers, and whether processes are gone."""

import json
import subprocess
import sys

import psutil

from launch.plans.environment import environment
from launch.plans.hosts import Host
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import LaunchPlan, RankProgram, single_plan
from launch.plans.tools import find_tools
from nd_dist.config import Config
from nd_dist.events import events_path, read_events
from tests.support.waiting import HANG_S, wait_until


def plan_of(
    config: Config, behaviour: str, ranks: int, launch_id: str = "L", *more: str, is_leased: bool = False
) -> LaunchPlan:
    options = (behaviour, *more)
    config_path = config.run_dir / "config.yaml"
    program = RankProgram("tests.support.rank_program", config_path, launch_id, options, is_leased)
    tools = find_tools()
    if ranks == 1:
        return single_plan(program, tools, {})
    return mpirun_plan(program, tools, {}, (Host("localhost", ranks),))


def rank_pids(config: Config, ranks: int) -> list[int]:
    events = [event for rank in range(ranks) for event in read_events(events_path(config.run_dir, rank))]
    return [event["pid"] for event in events if event["event"] == "rank_start"]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_gone(pids: list[int]) -> None:
    """Wait until processes that do not end by themselves have been ended."""
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def start_launcher(
    config: Config, behaviour: str = "hang", grace_s: int = 2 * HANG_S, before: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a launcher of two ranks, with words before its command, and return once both run."""
    words = json.dumps(list(plan_of(config, behaviour, 2).argv))
    code = (
        "import json, signal, sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background\n"
        "from launch.plans.environment import environment\nfrom launch.plans.plan import LaunchPlan\n"
        "from launch.supervise.run import Launch, run_plan\nfrom launch.supervise.watch import Watcher\n"
        f"plan = LaunchPlan(tuple(json.loads({words!r})), {{}}, 2)\n"
        f"launch = Launch('rank_program', Path({str(config.run_dir)!r}), 'L', plan, {grace_s})\n"
        "run_plan(launch, Watcher(Console()), environment())\n"
    )
    process = subprocess.Popen([*before, sys.executable, "-c", code], env=dict(environment()), stderr=subprocess.PIPE)
    wait_until(lambda: len(rank_pids(config, 2)) == 2)
    return process
