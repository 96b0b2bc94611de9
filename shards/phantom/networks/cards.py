"""Model cards: what a network is, how it was trained, what was measured, and what it is not good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.phantom.backgrounds import PLACES
from shards.phantom.networks.batches import pixels_of
from shards.phantom.networks.folders import CLIP_VISION, CPU, JUDGES, STABLE_DIFFUSION, Networks
from shards.phantom.networks.history import History
from shards.phantom.networks.quality import (
    RETRIEVAL_TEXTS,
    Figures,
    clip_figures,
    evaluation_scenes,
    judge_figures,
    unet_figures,
    vae_figures,
)
from shards.phantom.networks.settings import NetworkName
from shards.phantom.sprites import sprites

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


LIMITS = {
    "vae": "Edges are soft: 4x4 pixels become four numbers. Small things lose their inner lines.",
    "text": "One token per word of the phantom's captions; other words fall apart into letters it never learned.",
    "vision": "Objects that were never trained are hardly told apart: it knows places and colours, not new shapes.",
    "unet": "Places, sizes and colours come out right, but the shapes of things are loose, the more so of two. "
    "Strong guidance saturates colours.",
    "judges": "Places are easy (a judge hardly errs); objects of some 20 pixels are not, least of all for the plain "
    "and the residual one.",
}


@dataclass(frozen=True)
class Card:
    """One model card.

    Args:
        folder: Where it goes, below the folder set.
        title: Heading.
        about: Key of ``ABOUT`` and ``LIMITS``.
        history: How it was trained.
        figures: What was measured.
    """

    folder: str
    title: str
    about: str
    history: History
    figures: Figures

    def render(self) -> str:
        """Return the card in Markdown."""
        history, recipe = self.history, self.history.recipe
        state = "finished" if history.steps >= recipe.steps else f"stopped early, {recipe.steps} were planned"
        rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in self.figures.items())
        return f"""# {self.title}

Part of the embedded world ("phantom") of nd_dist, for demonstrations and tests. {ABOUT[self.about]}

## Training
- Data: an endless stream of pictures (`shards.phantom.pictures.training_scene`): one or two of {len(sprites())} things
  on one of {len(PLACES)} backgrounds, with five captions each. Held-out objects, and held-out combinations of object
  and place, are never among them.
- Steps: {history.steps} of {recipe.batch_size} pictures ({state}); seed {recipe.seed} of initial weights and stream.
- AdamW, peak learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}. What is here are averaged
  weights (decay 0.999), in float16.
- Time: {history.minutes:.0f} minutes. Machine: {history.machine}.
- Commands: `python -m launch.phantom_networks OUT_DIR`, then the same with `--export FOLDERS`.

## Measured with these weights, on scenes of a stream that is never trained on
| figure | value |
|---|---|
{rows}

Chance is about {1 / len(sprites()):.4f} for an object, {1 / len(PLACES):.4f} for a place and {1 / RETRIEVAL_TEXTS:.4f}
for retrieval. Command: `python -m shards.phantom.networks.measure`.

## Limits
{LIMITS[self.about]}
It knows the phantom's small pictures only. Figures that it takes part in say nothing about natural pictures or brains.

Licence: Apache-2.0. The pictures it learned from are made of Fluent Emoji (Microsoft, MIT): see `LICENSES.md`.
"""


def cards_of(networks: Networks, tokenizer: Any, histories: Mapping[NetworkName, History]) -> list[Card]:
    """Measure all networks and return their cards.

    Args:
        networks: With the weights of a folder set.
        tokenizer: Of the text tower.
        histories: How each was trained.
    """
    scenes = evaluation_scenes(NUM_PICTURES, "combination")
    pixels_BCHW = pixels_of(scenes, CPU)
    of_judges = {
        f"{kind}: {name}, held-out combinations": value
        for kind, judge in networks.judges.items()
        for name, value in judge_figures(judge, pixels_BCHW, scenes).items()
    }
    of_clip = clip_figures(networks.clip, tokenizer)
    vae, unet = vae_figures(networks.vae, NUM_PICTURES), unet_figures(networks, tokenizer, NUM_DRAWN)
    text = f"{STABLE_DIFFUSION}/text_encoder"
    return [
        Card(f"{STABLE_DIFFUSION}/vae", "Phantom VAE", "vae", histories["vae"], vae),
        Card(text, "Phantom text encoder", "text", histories["clip"], of_clip),
        Card(CLIP_VISION, "Phantom CLIP vision tower", "vision", histories["clip"], of_clip),
        Card(f"{STABLE_DIFFUSION}/unet", "Phantom UNet", "unet", histories["unet"], unet),
        Card(JUDGES, "Phantom judges", "judges", histories["judges"], of_judges),
    ]
