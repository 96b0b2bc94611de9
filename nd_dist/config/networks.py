"""Section about the phantom's own networks and their training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nd_dist.config.base import Count, Fraction, Positive, Section

NetworkName = Literal["vae", "clip", "judges", "unet"]


class NetworkRecipe(Section):
    """How long and how fast one network is trained."""

    steps: Positive
    """Optimizer steps in all."""
    batch_size: Positive
    """Rows of a global step; must be a multiple of the number of ranks."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak of the schedule: linear warm-up, constant, linear to zero; it counts global steps."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW weight decay, of every parameter."""
    seed: Count
    """Seed of the initial weights and of the endless stream of pictures; every network has its own."""


class PhantomNetworksConfig(Section):
    """Training of the phantom's networks; the defaults are those of the weights that come with the package."""

    stages: Annotated[tuple[NetworkName, ...], Field(min_length=1)] = ("vae", "clip", "judges", "unet")
    """Networks to train, in this order whatever order is given; the UNet needs the finished VAE and CLIP."""
    vae: NetworkRecipe = NetworkRecipe(steps=6000, batch_size=8, learning_rate=1.5e-3, weight_decay=0.0, seed=11)
    clip: NetworkRecipe = NetworkRecipe(steps=1000, batch_size=64, learning_rate=1e-3, weight_decay=0.05, seed=12)
    judges: NetworkRecipe = NetworkRecipe(steps=1500, batch_size=32, learning_rate=2e-3, weight_decay=0.02, seed=13)
    unet: NetworkRecipe = NetworkRecipe(steps=12_000, batch_size=32, learning_rate=1e-3, weight_decay=1e-2, seed=14)
    warmup_steps: Positive = 100
    """Steps in which the learning rate rises."""
    cooldown_fraction: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Last share of the steps, in which the learning rate falls to zero."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """AdamW's second moment decay (the first one's is 0.9)."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum global gradient norm; 0 is off."""
    average_decay: Fraction = 0.999
    """Decay of the averaged weights, which are what is shipped; less in the first steps."""
    autocast: bool = True
    """On a GPU compute in bfloat16 where torch's autocast allows it; on a CPU always float32."""
    checkpoint_every: Positive = 250
    """Steps between checkpoints."""
    scaling_pictures: Positive = 1024
    """Training pictures from whose latents the VAE's scaling factor is measured."""

    def recipe(self, name: NetworkName) -> NetworkRecipe:
        """Return the recipe of one network."""
        found: NetworkRecipe = getattr(self, name)
        return found
