"""Scenes: which things stand where, in which place, and which combinations are never trained on. Draws no pixels.

Held out, once and for all worlds: a set of *objects* (about one in twelve of every super-class) and, for every other
object, two of the sixteen places (*combinations*). Networks and ordinary pictures never show either.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from nd_dist.seeds import unit_seed
from shards.phantom.backgrounds import PLACES, SIZE
from shards.phantom.sprites import sprites

HeldOut = Literal["no", "combination", "object"]

HELD_OUT_SEED = 20_250_601
"""Decides what is held out. A constant of the phantom: shipped networks were trained with it."""
OBJECT_SHARE = 1 / 12
PLACES_PER_OBJECT = 2
PAIR_PERCENT = 30
"""Of 100 scenes so many show two things."""


@dataclass(frozen=True)
class Thing:
    """One object in a scene.

    Args:
        name: The sprite's name.
        super_class: The sprite's group.
        side: Side of its square, pixels.
        left, top: Corner of its square, pixels; the square lies inside the picture.
        flipped: Mirrored left to right.
    """

    name: str
    super_class: str
    side: int
    left: int
    top: int
    flipped: bool


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Args:
        place: Name of the background, a key of ``PLACES``.
        things: One or two objects; the first is the larger or equal one.
        held_out: Whether it shows a held-out combination or object, or neither.
        seed: Seeds the drawing of the background and the wording of the captions.
    """

    place: str
    things: tuple[Thing, ...]
    held_out: HeldOut
    seed: int


def _rank(*words: str) -> int:
    """Return a number that orders candidates to hold out."""
    return unit_seed(HELD_OUT_SEED, *words)


@cache
def held_out_objects() -> frozenset[str]:
    """Return the names of the objects that no training picture shows: about one in twelve of each super-class."""
    groups: dict[str, list[str]] = {}
    for sprite in sprites():
        groups.setdefault(sprite.super_class, []).append(sprite.name)
    chosen: list[str] = []
    for names in groups.values():
        chosen += sorted(names, key=_rank)[: round(len(names) * OBJECT_SHARE)]
    return frozenset(chosen)


@cache
def held_out_places(name: str) -> frozenset[str]:
    """Return the places in which no training picture shows the object ``name``."""
    return frozenset(sorted(PLACES, key=lambda place: _rank(name, place))[:PLACES_PER_OBJECT])


def kind_of(name: str, place: str) -> HeldOut:
    """Return whether an object, or the combination of an object and a place, is held out."""
    if name in held_out_objects():
        return "object"
    return "combination" if place in held_out_places(name) else "no"


@cache
def candidates(place: str, held_out: HeldOut) -> tuple[int, ...]:
    """Return the sprite indices that may stand in ``place`` in a scene of this kind."""
    return tuple(index for index, sprite in enumerate(sprites()) if kind_of(sprite.name, place) == held_out)


def compose(seed: int, held_out: HeldOut = "no") -> Scene:
    """Return the scene that a seed stands for: one or two different objects of one kind in a random place."""
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen: tuple[int, ...]
    place = tuple(PLACES)[rng.integers(len(PLACES))]
    pool = candidates(place, held_out)
    if rng.integers(100) < PAIR_PERCENT:
        first, step = rng.integers(len(pool)), rng.integers(1, len(pool))
        chosen = (pool[first], pool[(first + step) % len(pool)])
        boxes = _two_boxes(rng)
    else:
        chosen = (pool[rng.integers(len(pool))],)
        side = int(rng.integers(26, 47))
        boxes = ((side, *_corner(rng, side)),)
    flips = rng.integers(0, 2, 2)
    things = tuple(
        Thing(sprites()[index].name, sprites()[index].super_class, *box, bool(flip))
        for index, box, flip in zip(chosen, boxes, flips, strict=False)
    )
    return Scene(place, things, held_out, int(rng.integers(1 << 62)))


def _corner(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """Return (left, top) of a square that lies inside the picture."""
    left, top = rng.integers(0, SIZE - side + 1, 2)
    return int(left), int(top)


def _two_boxes(rng: np.random.Generator) -> tuple[tuple[int, int, int], ...]:
    """Return two squares (side, left, top) that do not overlap, the larger first."""
    sides = sorted((int(side) for side in rng.integers(20, 33, 2)), reverse=True)
    split = int(rng.integers(sides[0], SIZE - sides[1] + 1))  # the line between them
    near = int(rng.integers(0, split - sides[0] + 1))
    far = int(rng.integers(split, SIZE - sides[1] + 1))
    if rng.integers(2):
        near, far = SIZE - sides[0] - near, SIZE - sides[1] - far
    cross = [int(rng.integers(0, SIZE - side + 1)) for side in sides]
    if rng.integers(3):  # side by side twice as often as one above the other
        return (sides[0], near, cross[0]), (sides[1], far, cross[1])
    return (sides[0], cross[0], near), (sides[1], cross[1], far)
