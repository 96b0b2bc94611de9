"""The sprite pack: small pictures of things with a name and a super-class, read from package data. Draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nd_dist.files import read_json

DATA_DIR = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Sprite:
    """One thing of the world.

    Args:
        name: Its name in captions, lower-case words, unique.
        super_class: Its group (``mammal``, ``fruit``, ``land vehicle``, ...).
        rgba: (48, 48, 4) uint8, straight alpha, read-only.
    """

    name: str
    super_class: str
    rgba: npt.NDArray[np.uint8]


@cache
def sprites() -> tuple[Sprite, ...]:
    """Return all things in the order of the pack; a thing's position is its class index in every network."""
    with np.load(DATA_DIR / "sprites.npz", allow_pickle=False) as pack:
        rgba = pack["rgba"]
    rgba.setflags(write=False)
    things = read_json(DATA_DIR / "sprites.json")["things"]
    return tuple(
        Sprite(thing["name"], thing["super_class"], pixels) for thing, pixels in zip(things, rgba, strict=True)
    )


@cache
def sprite_index() -> dict[str, int]:
    """Return name -> position in :func:`sprites`."""
    return {sprite.name: index for index, sprite in enumerate(sprites())}
