"""A rank under a launcher of the user's own: the program that deepspeed, torchrun, srun or mpirun starts.

deepspeed --hostfile hosts --module launch.join train RECIPE key=value
torchrun --nnodes 2 --nproc-per-node 8 ... -m launch.join train RECIPE
srun python -m launch.join evaluate RECIPE
mpirun -n 16 python -m launch.join pack RECIPE

What starts and kills processes is the launcher's business. The process of rank 0 does the rest of what `nd` does: it
checks, holds the run folder, writes the recipe and the launch record, shows the progress and says how it ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Sequence

from launch.boundary import guarded
from launch.commands.launching import launch_of, run_launch
from launch.console import make_console
from launch.plans.choose import LEASED, new_launch_id
from launch.plans.environment import recipe_environment
from launch.plans.hosts import Host
from launch.plans.plan import RANK_MODULE, LaunchPlan, RankProgram
from launch.plans.tools import free_port_from, require_port
from launch.ranks import rank
from launch.recipe import config_path, load_recipe
from launch.supervise.door import Door, knock
from launch.supervise.lock import RunFolder
from launch.supervise.preflight import advice, preflight
from nd_dist.config import Config
from nd_dist.errors import ConfigError, NdDistError
from nd_dist.world import World

COMMANDS = ("pack", "train", "evaluate", "sweep", "estimate")


def main() -> None:
    """Run this process's rank, as its launcher's variables describe it."""
    guarded(lambda: join(sys.argv[1:]))


def join(arguments: Sequence[str]) -> None:
    """Take part in a command: ``COMMAND RECIPE key=value ...``; `--local_rank`, which DeepSpeed adds, means nothing.

    Raises:
        NdDistError: whatever is wrong with the words, the world, the run folder or the work.
    """
    words = [word for word in arguments if not word.replace("-", "_").startswith("__local_rank=")]
    command, recipe, *overrides = [*words, "", ""] if len(words) < 2 else words
    if command not in COMMANDS or not recipe or recipe.startswith("-"):
        raise ConfigError(
            "These words name no command and recipe.",
            where="python -m launch.join",
            expected=f"COMMAND RECIPE key=value ..., where COMMAND is one of {', '.join(COMMANDS)}",
            found=" ".join(words),
        )
    world, config = World.from_env(os.environ), load_recipe(recipe, overrides, command)
    if world.is_main:
        _lead(command, config, world)
        return
    launch_id = knock(config.run_dir, world, config.launch.start_s)
    rank.main(_program(command, config, launch_id))


def _program(command: str, config: Config, launch_id: str) -> tuple[str, ...]:
    """Return the words of a rank after the boundary's module."""
    return RankProgram(f"launch.ranks.{command}", config_path(config).resolve(), launch_id).arguments


def _lead(command: str, config: Config, world: World) -> None:
    """Do what `nd` does around a launch, start rank 0 itself and follow all ranks to their end."""
    launch_id, door = new_launch_id(command), Door(config.run_dir, world.size)
    with contextlib.ExitStack() as held:
        try:
            preflight(command, config, world.size)
            env = recipe_environment(config.launch)
            door.folder = folder = RunFolder(config.run_dir, launch_id, env, world.size)
            held.callback(folder.release)
            names = [socket.gethostname(), *door.wait(config.launch.start_s)]
        except NdDistError as error:
            door.refuse(error)
            raise
        folder.give(_meeting(names, config))
        folder.stop.most = 1  # launchers make several signals of one ctrl-C
        hosts = tuple(Host(name, len(list(same))) for name, same in itertools.groupby(names))
        argv = (sys.executable, "-m", RANK_MODULE, *_program(command, config, launch_id))
        plan = LaunchPlan(argv, {}, world.size, is_leased=command in LEASED, hosts=hosts)
        console = make_console()
        for line in advice(command, config, world.size):
            console.print(f"  note: {line}")
        run_launch(launch_of(command, config, launch_id, plan), config, console, door=door)


def _meeting(names: Sequence[str], config: Config) -> dict[str, str]:
    """Return where ranks meet whose launcher does not say it (srun, mpirun): at rank 0, on hosts of these names."""
    if "MASTER_ADDR" in os.environ:
        return {}
    own = os.environ.get("SLURMD_NODENAME", names[0])
    port = require_port(free_port_from(config.launch.port), config.launch.port)
    return {"MASTER_ADDR": own if len(set(names)) > 1 else "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    main()
