"""The four training stages in order (vae, clip, judges, unet), each built from what is already trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.phantom_networks.folders import Networks, build_networks, set_scaling_factor, text_encoder_of
from launch.phantom_networks.objectives import (
    ClipObjective,
    ClipWithClassifiers,
    Objective,
    UNetObjective,
    judges_loss,
    vae_loss,
)
from launch.phantom_networks.tokenizer import write_tokenizer
from launch.phantom_networks.trainer import Recipe, load_average, train
from nd_dist.errors import CheckpointError
from nd_dist.events import EventLog
from shards.phantom.captions import vocabulary

RECIPES = {
    "vae": Recipe("vae", steps=6000, batch_size=8, learning_rate=1.5e-3, seed=11, weight_decay=0.0),
    "clip": Recipe("clip", steps=1000, batch_size=64, learning_rate=1e-3, seed=12, weight_decay=0.05),
    "judges": Recipe("judges", steps=1500, batch_size=32, learning_rate=2e-3, seed=13, weight_decay=0.02),
    "unet": Recipe("unet", steps=12_000, batch_size=32, learning_rate=1e-3, seed=14),
}
"""What the shipped weights were trained with, in order; the UNet needs the finished VAE and CLIP."""
STAGES = tuple(RECIPES)


@dataclass(frozen=True)
class Workplace:
    """Where the stages run.

    Args:
        out_dir: States, tokenizer and events.
        recipes: Stage -> recipe.
        device: Of the training.
        events: Progress.
        scaling_pictures: Training pictures from which the latents' scaling factor is measured.
    """

    out_dir: Path
    recipes: dict[str, Recipe]
    device: torch.device
    events: EventLog
    scaling_pictures: int = 1024

    def tokenizer(self) -> Any:
        """Write (again) and return the tokenizer."""
        return write_tokenizer(self.out_dir / "tokenizer", vocabulary())

    def require_finished(self, network: nn.Module, name: str) -> None:
        """Load a stage's averaged weights into ``network``.

        Raises:
            CheckpointError: the stage has not reached its last step, so what follows would have to be trained again.
        """
        step, steps = load_average(network, self.out_dir, name), self.recipes[name].steps
        if step < steps:
            raise CheckpointError(
                f"The network {name!r} is not finished; the UNet is trained on its outputs.",
                where=str(self.out_dir),
                expected=f"{steps} steps",
                found=f"{step} steps",
                todo=f"python -m launch.phantom_networks {self.out_dir} --only {name}",
            )


def run_stage(name: str, place: Workplace) -> None:
    """Train one stage to its last step, or go on where it stopped."""
    recipe = place.recipes[name]
    tokenizer = place.tokenizer()
    networks = build_networks(recipe.seed, len(tokenizer))
    network: nn.Module
    objective: Objective
    if name == "vae":
        network, objective = networks.vae, vae_loss
    elif name == "clip":
        network, objective = _with_classifiers(networks.clip, recipe), ClipObjective(tokenizer)
    elif name == "judges":
        network, objective = networks.judges, judges_loss
    else:
        network, objective = networks.unet, _unet_objective(networks, tokenizer, place)
    train(network, objective, recipe, place.out_dir, place.events, place.device)


def _with_classifiers(clip: Any, recipe: Recipe) -> ClipWithClassifiers:
    """Return CLIP with its training-time classifiers, whose weights come from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return ClipWithClassifiers(clip)


def _unet_objective(networks: Networks, tokenizer: Any, place: Workplace) -> UNetObjective:
    """Return the UNet's objective on the finished VAE and text encoder."""
    classified = ClipWithClassifiers(networks.clip)
    place.require_finished(networks.vae, "vae")
    place.require_finished(classified, "clip")
    set_scaling_factor(networks.vae, place.recipes["vae"].seed, place.scaling_pictures)
    text_encoder = text_encoder_of(classified.clip)
    return UNetObjective(networks.vae.to(place.device), text_encoder.to(place.device), tokenizer)


def trained_networks(place: Workplace) -> tuple[Networks, dict[str, int]]:
    """Return all networks with the averaged weights of their newest states, and stage -> steps trained.

    Raises:
        CheckpointError: a stage has not begun.
    """
    networks = build_networks(0, len(place.tokenizer()))
    classified = ClipWithClassifiers(networks.clip)
    parts: dict[str, nn.Module] = {
        "vae": networks.vae,
        "clip": classified,
        "judges": networks.judges,
        "unet": networks.unet,
    }
    steps = {name: load_average(part, place.out_dir, name) for name, part in parts.items()}
    set_scaling_factor(networks.vae, place.recipes["vae"].seed, place.scaling_pictures)
    return networks, steps


def adjusted(recipes: dict[str, Recipe], steps: dict[str, int], autocast: bool) -> dict[str, Recipe]:
    """Return ``recipes`` with other numbers of steps for some stages, and with or without bfloat16 autocast."""
    return {
        name: replace(recipe, steps=steps.get(name, recipe.steps), autocast=autocast)
        for name, recipe in recipes.items()
    }
