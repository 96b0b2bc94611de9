"""Model cards: what a network is, how it was trained, what was measured, and what it is not good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nd_dist.files import read_json
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
from shards.phantom.sprites import DATA_DIR, sprites

NUM_PICTURES = 256
NUM_DRAWN = 96


@dataclass(frozen=True)
class Card:
    """One model card.

    Args:
        folder: Where it goes, below the folder set.
        title: Heading.
        about: Key of ``data/cards.json``.
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
        recipe = self.history.recipe
        is_finished = self.history.steps >= recipe.steps
        return (
            (DATA_DIR / "card.md")
            .read_text(encoding="utf-8")
            .format(
                title=self.title,
                **read_json(DATA_DIR / "cards.json")[self.about],
                history=self.history,
                recipe=recipe,
                state="finished" if is_finished else f"stopped early, {recipe.steps} were planned",
                num_things=len(sprites()),
                num_places=len(PLACES),
                rows="\n".join(f"| {name} | {value:.3f} |" for name, value in self.figures.items()),
                object_chance=1 / len(sprites()),
                place_chance=1 / len(PLACES),
                retrieval_chance=1 / RETRIEVAL_TEXTS,
            )
        )


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
