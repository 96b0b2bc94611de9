"""Trains the phantom networks, or exports what has been trained. Run it again to go on where it stopped.

python -m launch.phantom_networks OUT_DIR                       # all stages in order
python -m launch.phantom_networks OUT_DIR --only unet           # one stage
python -m launch.phantom_networks OUT_DIR --export FOLDERS      # Hugging Face folders of the newest states
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from launch.phantom_networks.cards import write_cards
from launch.phantom_networks.folders import STABLE_DIFFUSION, write_folders
from launch.phantom_networks.quality import contact_sheet
from launch.phantom_networks.stages import RECIPES, STAGES, Workplace, adjusted, run_stage, trained_networks
from launch.phantom_networks.trainer import Recipe
from nd_dist.errors import ConfigError
from nd_dist.evaluation.networks import REMARK
from nd_dist.events import EventLog
from nd_dist.files import atomic_path, write_text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.phantom_networks", description=__doc__)
    parser.add_argument("out_dir", type=Path, help="states, tokenizer and events")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated")
    parser.add_argument("--steps", default="", help="other numbers of steps, e.g. vae=100,unet=200")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--export", type=Path, help="write the folders here instead of training")
    return parser.parse_args(arguments)


def _chosen_steps(text: str) -> dict[str, int]:
    """Return stage -> steps from ``vae=100,unet=200``.

    Raises:
        ConfigError: not of this form, or no such stage.
    """
    chosen: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        if name not in STAGES or not number.isdigit():
            raise ConfigError("--steps is wrong.", expected=f"stage=number of {', '.join(STAGES)}", found=item)
        chosen[name] = int(number)
    return chosen


def _export(place: Workplace, folder: Path) -> None:
    """Write folders, model cards and, beside the states, a contact sheet of the newest states."""
    networks, steps = trained_networks(place)
    tokenizer = place.tokenizer()
    write_folders(folder, networks)
    _write_remark(folder / STABLE_DIFFUSION / REMARK, steps, place.recipes)
    figures = write_cards(folder, networks, tokenizer, place.recipes, steps)
    with atomic_path(place.out_dir / "sheet.png") as part:
        Image.fromarray(contact_sheet(networks, tokenizer)).save(part, format="png")
    place.events.write("exported", folder=folder, steps=steps, figures=figures)


def _write_remark(path: Path, steps: dict[str, int], recipes: dict[str, Recipe]) -> None:
    """Write the sentence that reports show while a network is not fully trained; remove it once all are."""
    path.unlink(missing_ok=True)
    short = [name for name in STAGES if steps[name] < recipes[name].steps]
    missing = [f"{name}: {steps[name]} of {recipes[name].steps} steps" for name in short]
    if missing:
        write_text(path, f"The phantom networks are not fully trained ({', '.join(missing)}).\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program (see the module's docstring)."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(options.device == "cpu")  # CUDA would need settings of the environment
    place = Workplace(
        options.out_dir,
        adjusted(RECIPES, _chosen_steps(options.steps), autocast=options.device == "cuda"),
        torch.device(options.device),
        EventLog(options.out_dir, 0, "phantom-networks"),
    )
    if options.export:
        _export(place, options.export)
        return
    names = options.only.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise ConfigError("--only names no stage.", expected=", ".join(STAGES), found=", ".join(unknown))
    for name in (stage for stage in STAGES if stage in names):
        run_stage(name, place)


if __name__ == "__main__":
    main()
