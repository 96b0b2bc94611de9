"""Starts the ranks of a command as `nd` does, but with ``rank_program`` as their work.

python -m tests.support.launch_program COMMAND RUN_DIR BEHAVIOUR [key=value ...] [--option=value ...]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from rich.console import Console

from launch.commands.launching import launch_of
from launch.plans.choose import LaunchOptions, make_plan
from launch.plans.environment import environment
from launch.plans.plan import plain_word
from launch.plans.tools import find_tools
from launch.recipe import load_recipe
from launch.supervise.run import run_plan
from launch.supervise.watch import Watcher

PROGRAM = "tests.support.rank_program"


def main() -> None:
    command, run_dir, behaviour, *words = sys.argv[1:]
    given = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    options = LaunchOptions(
        int(given["ranks"]) if "ranks" in given else None,
        Path(given["hostfile"]) if "hostfile" in given else None,
        given.get("launcher", "auto"),
        given.get("include", ""),
    )
    config = load_recipe("demo", [f"run_dir={run_dir}", *(word for word in words if not word.startswith("--"))])
    plan = make_plan(command, config, options, find_tools(config.launch), "L")
    argv = [PROGRAM if word == f"launch.ranks.{command}" else word for word in plan.argv]
    plan = dataclasses.replace(plan, argv=(*argv, plain_word(behaviour)))
    launch = dataclasses.replace(launch_of(command, config, "L", plan), command="rank_program", silence_s=120)
    run_plan(launch, Watcher(Console()), environment(plan))
    Console(soft_wrap=True).print(plan.note, highlight=False)


if __name__ == "__main__":
    main()
