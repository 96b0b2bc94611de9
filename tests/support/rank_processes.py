"""Plans of ``rank_program`` with real launchers, and whether processes are gone."""

import time

import psutil

from launch.plans.hosts import Host
from launch.plans.mpi import mpirun_plan
from launch.plans.plan import LaunchPlan, RankProgram, single_plan
from launch.plans.tools import find_tools
from nd_dist.config import Config
from nd_dist.events import events_path, read_events


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


def assert_gone(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)
