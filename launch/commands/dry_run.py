"""`--dry-run`: prints what a command would run and whether it would start, and starts nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from launch.console import make_console
from launch.grid.plan import GridRequest
from launch.grid.run import make_grid, show_grid
from launch.grid.state import grid_checks
from launch.plans.choose import LaunchOptions, choose, make_plan, require_head
from launch.plans.tools import find_tools
from launch.recipe import changed_settings, yaml_text
from launch.supervise.preflight import Problems, advice, preflight, require, require_starters
from nd_dist.config import Config
from nd_dist.errors import CheckpointError, NdDistError
from nd_dist.world import World

if TYPE_CHECKING:
    from shards.packing.targets import TargetExtractor


def dry_run_command(
    command: str,
    config: Config,
    options: LaunchOptions,
    check: Callable[[str, Config, int], Mapping[str, str]] = preflight,
) -> None:
    """Print what a command would run, and whether it would start; start nothing.

    Raises:
        NdDistError: it would be refused.
    """
    require_head(command, os.environ)
    console = _told(config)
    plan = make_plan(command, config, options, find_tools(config.launch), f"{command}-LAUNCH_ID")
    hosts = ", ".join(host.describe() for host in choose(command, config, options, os.environ).hosts)
    console.print(f"# hosts: {hosts}")
    for path, text in plan.files.items():
        console.print(f"# file {path}:\n{text}", end="")
    if plan.note:
        console.print(f"# note: {plan.note}")
    console.print(plan.shell())
    with _verdict(console):
        failed = _say_pack(config, plan.ranks, console) if command == "pack" else None
        for name, found in check(command, config, plan.ranks).items():
            if (command, name) != ("pack", "data set"):  # that was said with its sizes
                console.print(f"# {name}: {found}")
        require_starters(plan)
        for line in advice(command, config, plan.ranks):
            console.print(f"# note: {line}")
        if failed is not None:
            raise failed


def dry_run_grid(config: Config, request: GridRequest, options: LaunchOptions) -> None:
    """Print what a grid of trainings would run, and whether they would start; start nothing.

    Raises:
        NdDistError: it would be refused.
    """
    console = _told(config)
    grid = make_grid(config, request, options)
    show_grid(grid, console)
    with _verdict(console):
        require(grid_checks(config, grid.plan, grid.ranks))


def _told(config: Config) -> Console:
    """Return a console on which the settings of a command were printed."""
    console = make_console()
    console.print(
        f"# {config.run_dir / 'config.yaml'} where it differs from the defaults (`nd config show` prints everything)"
    )
    console.print(yaml_text(changed_settings(config)))
    return console


@contextlib.contextmanager
def _verdict(console: Console) -> Iterator[None]:
    """Print at the end of the block whether a launch would start."""
    try:
        yield
    except NdDistError as error:
        for problem in error.problems if isinstance(error, Problems) else (error,):
            console.print(f"# would be refused: {problem.what}")
        raise
    console.print("# would start")


def _say_pack(config: Config, ranks: int, console: Console) -> NdDistError | None:
    """Print what packing would do as far as that is known; return what stood in the way, which checks may explain."""
    try:
        for line in describe_pack(config, ranks):
            console.print(f"# {line}")
    except NdDistError as error:
        return error
    return None


def describe_pack(config: Config, ranks: int) -> Iterator[str]:
    """Yield what packing would do: shards and bytes, then minutes, from a small sample of the real data.

    Raises:
        DataError: data is missing.
    """
    from launch.ranks.networks import load_extractor
    from nd_dist.compute.device import rank_device
    from shards.packing.estimate import estimate_pack
    from shards.packing.pack import plan_pack

    shape_free = plan_pack(config)  # what is missing is said before networks are loaded
    extractor: TargetExtractor | None = None
    if config.data.targets:
        try:
            extractor = load_extractor(config, rank_device(World()))
        except CheckpointError as error:  # a dry run on a machine without the networks still tells the rest
            yield f"the networks are not on this machine, their targets are not counted: {error.where}"
    yield (plan_pack(config, extractor.specs) if extractor is not None else shape_free).describe()
    yield estimate_pack(config, extractor).describe(ranks)
