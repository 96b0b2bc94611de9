"""Model cards: what a network is, how it was trained, what was measured, and what it is not good for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.phantom_networks.batches import pixels_of
from launch.phantom_networks.folders import CLIP_VISION, CPU, JUDGES, STABLE_DIFFUSION, Networks
from launch.phantom_networks.quality import (
    Figures,
    clip_figures,
    evaluation_scenes,
    judge_figures,
    unet_figures,
    vae_figures,
)
from nd_dist.config import NetworkRecipe, PhantomNetworksConfig
from nd_dist.files import write_text

NUM_PICTURES = 256
NUM_DRAWN = 96

ABOUT = {
    "vae": "An `AutoencoderKL` of diffusers: 64x64 pictures to latents of 4x16x16 and back. Trained with absolute and "
    "squared errors of pixels, absolute errors of slopes and (late in training) of 4x4 means and hues, and a weak "
    "Kullback-Leibler term. `scaling_factor` is one "
    "over the standard deviation of its latents on training pictures.",
    "text": "The text tower of the phantom's CLIP (`CLIPTextModel`, 3 layers, width 128, 24 tokens, one token per "
    "word), trained contrastively together with the vision tower and, in training only, with linear classifiers of "
    "objects and places.",
    "vision": "The vision tower of the phantom's CLIP (`CLIPVisionModel`, 6 blocks, width 128, patch 8, 65 tokens, "
    "quick GELU). Its input is normalised with ImageNet's statistics. The guidance compares the outputs of `mlp.fc2` "
    "of all six blocks.",
    "unet": "A `UNet2DConditionModel` of diffusers that predicts noise on 4x16x16 latents with the schedule of Stable "
    "Diffusion 1.4, given the text tokens: one caption's, the mean over five captions, or, for one row in ten, the "
    "empty caption's. Loss weights: min-SNR, gamma 5.",
    "judges": "Four small classifiers (plain convolutions, residual, depthwise, mixer) of objects and places that "
    "stand in for the metric networks. Architectures, seeds and training stream differ from the guidance CLIP's.",
}


@dataclass(frozen=True)
class Card:
    """One model card.

    Args:
        folder: Where it goes, below the folder set.
        title: Heading.
        about: Key of ``ABOUT``.
        recipe: How it was trained.
        steps: Steps trained so far.
        figures: What was measured.
    """

    folder: str
    title: str
    about: str
    recipe: NetworkRecipe
    steps: int
    figures: Figures

    def render(self) -> str:
        """Return the card in Markdown."""
        recipe = self.recipe
        state = "finished" if self.steps >= recipe.steps else f"stopped early, {recipe.steps} were planned"
        rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in self.figures.items())
        return f"""# {self.title}

Part of the embedded world ("phantom") of nd_dist, for demonstrations and tests. {ABOUT[self.about]}

## Training
Pictures of `shards.phantom.pictures.training_scene`: endless, without held-out objects and combinations.
{self.steps} steps of {recipe.batch_size} rows ({state}), seed {recipe.seed}, AdamW, peak learning rate
{recipe.learning_rate:g}, averaged weights (decay 0.999). Weights are stored in float16.
Command: `python -m launch.phantom_networks OUT_DIR`.

## Measured on pictures that were never trained on
| figure | value |
|---|---|
{rows}

## Limits
It knows the phantom's small pictures only. Figures that it takes part in say nothing about natural pictures or brains.

Licence: Apache-2.0. The pictures it learned from are made of Fluent Emoji (Microsoft, MIT).
"""


def write_cards(
    out_dir: Path, networks: Networks, tokenizer: Any, settings: PhantomNetworksConfig, steps: dict[str, int]
) -> dict[str, Figures]:
    """Measure all networks, write ``README.md`` beside each and return the figures by network.

    Args:
        out_dir: The folder set.
        networks: With the weights of the folder set.
        tokenizer: Of the text tower.
        recipes, steps: Stage -> recipe, and steps trained.
    """
    scenes = evaluation_scenes(NUM_PICTURES, "combination")
    pixels_BCHW = pixels_of(scenes, CPU)
    of_judges = {
        f"{kind}: {name}": value
        for kind, judge in networks.judges.items()
        for name, value in judge_figures(judge, pixels_BCHW, scenes).items()
    }
    of_clip = clip_figures(networks.clip, tokenizer)
    vae, unet = vae_figures(networks.vae, NUM_PICTURES), unet_figures(networks, tokenizer, NUM_DRAWN)
    text = f"{STABLE_DIFFUSION}/text_encoder"
    cards = [
        Card(f"{STABLE_DIFFUSION}/vae", "Phantom VAE", "vae", settings.vae, steps["vae"], vae),
        Card(text, "Phantom text encoder", "text", settings.clip, steps["clip"], of_clip),
        Card(CLIP_VISION, "Phantom CLIP vision tower", "vision", settings.clip, steps["clip"], of_clip),
        Card(f"{STABLE_DIFFUSION}/unet", "Phantom UNet", "unet", settings.unet, steps["unet"], unet),
        Card(JUDGES, "Phantom judges", "judges", settings.judges, steps["judges"], of_judges),
    ]
    for card in cards:
        write_text(out_dir / card.folder / "README.md", card.render())
    return {card.folder: card.figures for card in cards}
