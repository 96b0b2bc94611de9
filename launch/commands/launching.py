"""Launches a command of `nd`: check first, plan, start, report how it ended."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.console import make_console
from launch.host_agents.agents import HostAgents, Inquiry, require_hosts
from launch.pack_recipe import pack_recipe_path, told_of, write_pack_recipe
from launch.plans.choose import DEEPSPEED, LaunchOptions, make_plan, new_launch_id, require_head
from launch.plans.environment import environment
from launch.plans.hosts import num_local_gpus
from launch.plans.plan import LaunchPlan
from launch.plans.tools import find_tools, require_port
from launch.recipe import config_path, config_yaml
from launch.supervise.door import Door
from launch.supervise.lock import state_dir
from launch.supervise.preflight import advice, preflight, require_gpus, require_starters
from launch.supervise.run import Launch, run_plan
from launch.supervise.watch import Watcher
from nd_dist.config import Config
from nd_dist.events import events_path


def launch_command(
    command: str,
    config: Config,
    options: LaunchOptions,
    console: Console | None = None,
    check: Callable[[str, Config, int], object] = preflight,
) -> None:
    """Check, write the config, start the ranks of a command and follow them to the end.

    Raises:
        NdDistError: see ``run_plan``, ``preflight`` and ``HostAgents``.
    """
    require_head(command, os.environ)
    console = console or make_console()
    launch_id, tools = new_launch_id(command), find_tools(config.launch)
    plan = make_plan(command, config, options, tools, launch_id)
    check(command, config, plan.ranks)
    require_starters(plan)
    if command in DEEPSPEED and plan.ranks > 1 and not plan.hosts:
        require_gpus("this machine", plan.ranks, num_local_gpus())
    for line in advice(command, config, plan.ranks):
        console.print(f"  note: {line}")
    with contextlib.ExitStack() as stack:
        agents = _agents_of(command, config, plan, launch_id)
        if agents is not None:
            stack.enter_context(agents)
            facts = agents.facts()
            require_hosts(facts)
            for host in facts if command in DEEPSPEED else ():
                require_gpus(host.host.name, host.host.slots, host.gpus)
            port = require_port(facts[0].port, config.launch.port, plan.hosts[0].name)
            tools = replace(tools, address=facts[0].address, port=port)
            plan = make_plan(command, config, options, tools, launch_id)
        if plan.note:
            console.print(f"  note: {plan.note}")
        run_launch(launch_of(command, config, launch_id, plan), config, console, agents)


def launch_of(command: str, config: Config, launch_id: str, plan: LaunchPlan) -> Launch:
    """Return a launch that writes the recipe which its ranks read, once the run folder is its own."""
    plan = replace(plan, files={**plan.files, config_path(config): config_yaml(config)})
    limits = (config.launch.stop_grace_s, config.launch.silence_s, config.launch.start_s)
    return Launch(command, config.run_dir, launch_id, plan, *limits)


def run_launch(
    launch: Launch, config: Config, console: Console, agents: HostAgents | None = None, door: Door | None = None
) -> None:
    """Start the ranks of a launch, follow them to the end, and say what they did; see ``run_plan``."""
    command, plan, started = launch.command, launch.plan, time.monotonic()
    if command == "pack" and not pack_recipe_path(config.shards_folder).is_file():
        write_pack_recipe(config)
    lost = run_plan(launch, Watcher(console), os.environ if door else environment(plan), agents, door)
    if command == "pack":  # one that was refused leaves the recipe that the shards were packed by
        write_pack_recipe(config)
        for line in told_of(config):
            console.print(f"  note: {line}", highlight=False, markup=False)
    if lost:
        console.print(f"  note: ranks {lost} were lost on the way; the others did their work")
    seconds = time.monotonic() - started
    console.print(f"  {command}: done by {plan.ranks} rank(s) in {seconds:.1f} s -> {result_of(command, config)}")


def _agents_of(command: str, config: Config, plan: LaunchPlan, launch_id: str) -> HostAgents | None:
    """Return agents for the hosts of a plan that ssh reaches; under Slurm and on this machine none are needed."""
    if not plan.hosts or plan.argv[0] == "srun":
        return None
    shared_dir = state_dir(config.run_dir).resolve()
    inquiry = Inquiry(launch_id, shared_dir, config.launch)
    logs = config.run_dir / "logs" / command
    return HostAgents(plan.hosts, inquiry, logs, environment(), always_ssh="pdsh" in plan.argv)


def result_of(command: str, config: Config) -> Path | str:
    """Return the path that a command leaves for the user to look at."""
    if command == "pack":
        return f"{config.shards_dir}/index.json"
    if command == "estimate":
        return events_path(config.run_dir, 0)
    return config.run_dir / ("checkpoints" if command in DEEPSPEED else "metrics.json")
