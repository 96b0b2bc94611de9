"""Trains the phantom networks on DeepSpeed ranks, or exports what has been trained. Run it again to go on.

python -m launch.phantom_networks OUT_DIR                                  # all networks in order
python -m launch.phantom_networks OUT_DIR --ranks 2                        # the same numbers, up to rounding
python -m launch.phantom_networks OUT_DIR phantom_networks.stages=[unet]   # one network
python -m launch.phantom_networks OUT_DIR --export FOLDERS                 # Hugging Face folders, newest weights
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from launch.cli import guarded
from launch.commands import LaunchOptions, dry_run_command, launch_command
from launch.phantom_networks.cards import write_cards
from launch.phantom_networks.folders import STABLE_DIFFUSION, write_folders
from launch.phantom_networks.quality import contact_sheet
from launch.phantom_networks.stages import STAGES, trained_networks
from launch.phantom_networks.workplace import Workplace
from launch.plan import LAUNCHERS
from launch.recipe import load_recipe
from nd_dist.config import PhantomNetworksConfig
from nd_dist.evaluation.networks import REMARK
from nd_dist.events import EventLog
from nd_dist.files import atomic_path, write_text

COMMAND = "phantom_networks"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m launch.phantom_networks", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("out_dir", type=Path, help="checkpoints, averaged weights, tokenizer, logs and events")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. phantom_networks.unet.steps=200")
    parser.add_argument("--recipe", default=COMMAND, help="recipe: a name or the path of a YAML file")
    parser.add_argument("--ranks", type=int, help="ranks to start (default: one per GPU, or one)")
    parser.add_argument("--hostfile", type=Path, help="DeepSpeed hostfile: lines of `NAME slots=N`")
    parser.add_argument("--launcher", default="auto", choices=[name for name in LAUNCHERS if name != "mpirun"])
    parser.add_argument("--dry-run", action="store_true", help="print what would run; run nothing")
    parser.add_argument("--export", type=Path, help="write the folders and their cards here instead of training")
    return parser.parse_args(arguments)


def export(place: Workplace, folder: Path) -> None:
    """Write folders, model cards and, beside the states, a contact sheet of the newest averaged weights."""
    networks, steps = trained_networks(place)
    tokenizer = place.tokenizer()
    write_folders(folder, networks)
    write_remark(folder / STABLE_DIFFUSION / REMARK, steps, place.settings)
    figures = write_cards(folder, networks, tokenizer, place.settings, steps)
    with atomic_path(place.out_dir / "sheet.png") as part:
        Image.fromarray(contact_sheet(networks, tokenizer)).save(part, format="png")
    place.events.write("exported", folder=folder, steps=steps, figures=figures)


def write_remark(path: Path, steps: dict[str, int], settings: PhantomNetworksConfig) -> None:
    """Write the sentence that reports show while a network is not fully trained; remove it once all are."""
    path.unlink(missing_ok=True)
    planned = {name: settings.recipe(name).steps for name in STAGES}
    missing = [f"{name}: {steps[name]} of {planned[name]} steps" for name in STAGES if steps[name] < planned[name]]
    if missing:
        write_text(path, f"The phantom networks are not fully trained ({', '.join(missing)}).\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program (see the module's docstring)."""
    options = _parse(arguments)
    config = load_recipe(options.recipe, [f"run_dir={options.out_dir}", *options.overrides])
    wanted = LaunchOptions(options.ranks, options.hostfile, options.launcher)
    if options.export:
        place = Workplace(config.run_dir, config.phantom_networks, EventLog(config.run_dir, 0, COMMAND))
        export(place, options.export)
    elif options.dry_run:
        dry_run_command(COMMAND, config, wanted)
    else:
        launch_command(COMMAND, config, wanted)


if __name__ == "__main__":
    guarded(main)
