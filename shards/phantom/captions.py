"""Five captions per scene from five templates, as COCO has five captions per picture."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from nd_dist.files import read_json
from shards.phantom.backgrounds import SIZE
from shards.phantom.scenes import Scene, Thing
from shards.phantom.sprites import DATA_DIR, sprites

NUM_CAPTIONS = 5


@cache
def _words() -> dict[str, Any]:  # Any: JSON
    """Return the words that captions are made of; see the file."""
    found: dict[str, Any] = read_json(DATA_DIR / "words.json")
    return found


def _with_article(words: str) -> str:
    """Return ``words`` with "a" or "an" before it where English wants one."""
    if words.split()[-1] in _words()["no_article"]:
        return words
    return f"{'an' if words[0] in 'aeio' or words.startswith('umbrella') else 'a'} {words}"


def _size(thing: Thing, alone: bool) -> str:
    """Return the word for a thing's size."""
    return ("big" if thing.side >= 36 else "small") if alone else ("big" if thing.side >= 26 else "small")


def _position(thing: Thing) -> str:
    """Return the words for where in the picture a thing is."""
    across, down = 2 * thing.left + thing.side - SIZE, 2 * thing.top + thing.side - SIZE
    if max(abs(across), abs(down)) < 10:
        return "in the middle"
    if abs(across) >= abs(down):
        return "on the left" if across < 0 else "on the right"
    return "at the top" if down < 0 else "at the bottom"


def _relation(first: Thing, second: Thing) -> str:
    """Return the words for where the first of two things is as seen from the second."""
    across = 2 * (first.left - second.left) + first.side - second.side
    down = 2 * (first.top - second.top) + first.side - second.side
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def captions_of(scene: Scene) -> tuple[str, ...]:
    """Return the five captions of a scene, lower case, no punctuation, at most 22 words."""
    where, where_else, noun = _words()["places"][scene.place]
    if np.random.Generator(np.random.PCG64(scene.seed)).integers(2):
        where, where_else = where_else, where
    first = scene.things[0]
    sized = _with_article(f"{_size(first, len(scene.things) == 1)} {first.name}")
    plain = _with_article(first.name)
    if len(scene.things) == 1:
        return (
            f"{sized} {where}",
            f"{plain} {_position(first)} {where_else}",
            f"a picture of {plain} {where}",
            f"{plain} with {noun} behind it",
            f"{noun} and {sized} {_position(first)}",
        )
    other = _with_article(scene.things[1].name)
    return (
        f"{plain} and {other} {where}",
        f"{plain} {_relation(*scene.things)} {other} {where_else}",
        f"a picture of {other} next to {plain} {where}",
        f"{sized} and {other} with {noun} behind them",
        f"{noun} with {other} and {plain}",
    )


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word that a caption can hold, sorted."""
    words = set(_words()["templates"])
    for phrases in _words()["places"].values():
        words |= {word for phrase in phrases for word in phrase.split()}
    return tuple(sorted(words | {word for sprite in sprites() for word in sprite.name.split()}))
