"""Trains the phantom networks on DeepSpeed ranks, or exports what has been trained. Run it again to go on.

python -m launch.phantom_networks OUT_DIR                                  # all networks in order
python -m launch.phantom_networks OUT_DIR --ranks 2                        # the same numbers, up to rounding
python -m launch.phantom_networks OUT_DIR stages=[unet]                    # one network
python -m launch.phantom_networks OUT_DIR --export FOLDERS                 # Hugging Face folders, newest weights
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.boundary import guarded
from launch.commands.dry_run import dry_run_command
from launch.commands.launching import launch_command
from launch.plans.choose import LaunchOptions
from launch.plans.plan import LAUNCHERS
from launch.recipe import config_yaml, load_settings
from nd_dist.config import Config
from nd_dist.files import write_text
from shards.phantom.networks.settings import NETWORKS_YAML, NetworksRecipe

COMMAND = "phantom_networks"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program (see the module's docstring)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, help="checkpoints, averaged weights, tokenizer, logs and events")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. unet.steps=200")
    parser.add_argument("--recipe", type=Path, help="YAML file (default: as the package's networks were trained)")
    parser.add_argument("--ranks", type=int, help="ranks to start (default: one per GPU, or one)")
    parser.add_argument("--hostfile", type=Path, help="hosts: lines of `NAME slots=N` or `NAME:N`")
    parser.add_argument("--launcher", default="auto", choices=[name for name in LAUNCHERS if name != "mpirun"])
    parser.add_argument("--dry-run", action="store_true", help="print what would run; run nothing")
    parser.add_argument("--export", type=Path, help="write the folders and their cards here instead of training")
    options = parser.parse_args(arguments)
    settings = load_settings(NetworksRecipe, options.recipe, options.overrides)
    config = Config(run_dir=options.out_dir, launch=settings.launch)
    wanted = LaunchOptions(options.ranks, options.hostfile, options.launcher)

    def check(_command: str, _config: Config, ranks: int) -> dict[str, str]:
        settings.require_divisible(ranks)
        if not options.dry_run:
            write_text(options.out_dir / NETWORKS_YAML, config_yaml(settings))
        return {}

    if options.export:
        from shards.phantom.networks.export import export  # heavy: torch and the networks

        export(options.out_dir, settings, options.export)
    elif options.dry_run:
        dry_run_command(COMMAND, config, wanted, check)
    else:
        launch_command(COMMAND, config, wanted, check=check)


if __name__ == "__main__":
    guarded(main)
