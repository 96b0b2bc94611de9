"""Where the phantom's networks are trained, and by which ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nd_dist.config import PhantomNetworksConfig
from nd_dist.events import EventLog
from nd_dist.training.gather import Gather, identity
from nd_dist.world import World
from shards.phantom.captions import vocabulary
from shards.phantom.networks.tokenizer import write_tokenizer


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
    settings: PhantomNetworksConfig
    events: EventLog
    world: World = field(default_factory=World)
    gather: Gather = identity
    timeout_s: int = 600
    should_stop: Callable[[], bool] = bool

    def tokenizer(self) -> Any:  # Any: transformers ships no usable types
        """Write (again) and return the tokenizer."""
        return write_tokenizer(self.out_dir / "tokenizer", vocabulary())
