"""Exports trained phantom networks: folders in Hugging Face layout, model cards, a sheet of pictures to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from nd_dist.evaluation.reconstruction.networks import REMARK
from nd_dist.events import EventLog
from nd_dist.files import atomic_path, write_text
from shards.phantom.networks.folders import STABLE_DIFFUSION, write_folders
from shards.phantom.networks.history import history_of, write_history
from shards.phantom.networks.measure import measure
from shards.phantom.networks.quality import contact_sheet
from shards.phantom.networks.settings import NetworkName, NetworksRecipe, Workplace
from shards.phantom.networks.stages import STAGES, trained_networks


def export(out_dir: Path, settings: NetworksRecipe, folder: Path) -> None:
    """Write folders, model cards and, beside the states, a contact sheet of the newest averaged weights.

    Raises:
        CheckpointError: a network has no checkpoint yet.
    """
    place = Workplace(out_dir, settings, EventLog(out_dir, 0, "export"))
    networks, steps = trained_networks(place)
    tokenizer = place.tokenizer()
    write_folders(folder, networks)
    write_remark(folder / STABLE_DIFFUSION / REMARK, steps, place.settings)
    recipe = place.settings.recipe
    write_history(folder, {name: history_of(place.out_dir, name, recipe(name), steps[name]) for name in STAGES})
    figures = measure(folder, write=True)
    with atomic_path(place.out_dir / "sheet.png") as part:
        Image.fromarray(contact_sheet(networks, tokenizer)).save(part, format="png")
    place.events.write("exported", folder=folder, steps=steps, figures=figures)


def write_remark(path: Path, steps: Mapping[NetworkName, int], settings: NetworksRecipe) -> None:
    """Write the sentence that reports show while a network is not fully trained; remove it once all are."""
    path.unlink(missing_ok=True)
    planned = {name: settings.recipe(name).steps for name in STAGES}
    missing = [f"{name}: {steps[name]} of {planned[name]} steps" for name in STAGES if steps[name] < planned[name]]
    if missing:
        write_text(path, f"The phantom networks are not fully trained ({', '.join(missing)}).\n")
