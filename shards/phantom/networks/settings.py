"""What the training of the phantom's networks is told: recipes, and where and by which ranks it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nd_dist.config import LaunchConfig
from nd_dist.config.base import Count, Fraction, Positive, Section
from nd_dist.errors import ConfigError
from nd_dist.events import EventLog
from nd_dist.training.ranks import Gather, identity
from nd_dist.world import World
from shards.phantom.captions import vocabulary
from shards.phantom.networks.tokenizer import write_tokenizer

NetworkName = Literal["vae", "clip", "judges", "unet"]
NETWORKS_YAML = "networks.yaml"
"""Name of the file of these settings, beside a run's config.yaml."""


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


class NetworksRecipe(Section):
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

    launch: LaunchConfig = LaunchConfig()

    def require_divisible(self, ranks: int) -> None:
        """Refuse a number of ranks that cannot share the steps.

        Raises:
            ConfigError: the ranks do not divide the rows of a step.
        """
        for name in self.stages:
            rows = self.recipe(name).batch_size
            if rows % ranks:
                raise ConfigError(
                    f"{ranks} ranks do not divide the {rows} rows of a step.",
                    where=f"{name}.batch_size",
                    todo="choose a number of ranks that does: the global batch must not depend on it",
                )

    def recipe(self, name: NetworkName) -> NetworkRecipe:
        """Return the recipe of one network."""
        found: NetworkRecipe = getattr(self, name)
        return found


@dataclass(frozen=True)
class Workplace:
    """What all stages share.

    Args:
        out_dir: Checkpoints, averaged weights, tokenizer and events.
        settings: Recipes of the networks.
        events: This rank's event file.
        world: Who this rank is.
        gather: How rows of all ranks are collected.
        timeout_s: Longest wait of a collective call.
        should_stop: Whether this rank was asked to save and stop.
    """

    out_dir: Path
    settings: NetworksRecipe
    events: EventLog
    world: World = field(default_factory=World)
    gather: Gather = identity
    timeout_s: int = 600
    should_stop: Callable[[], bool] = bool

    def tokenizer(self) -> Any:  # Any: transformers ships no usable types
        """Write (again) and return the tokenizer."""
        return write_tokenizer(self.out_dir / "tokenizer", vocabulary())
