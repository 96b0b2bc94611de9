"""Five captions per scene from five templates, as COCO has five captions per picture."""

from __future__ import annotations

from functools import cache

import numpy as np

from shards.phantom.backgrounds import SIZE
from shards.phantom.scenes import Scene, Thing
from shards.phantom.sprites import sprites

NUM_CAPTIONS = 5

PLACE_PHRASES: dict[str, tuple[str, str, str]] = {
    "sky": ("in the sky", "under white clouds", "blue sky"),
    "sunset": ("at sunset", "in the evening sky", "a sunset"),
    "night": ("at night", "under the stars", "a starry night"),
    "sea": ("at sea", "on the waves", "the sea"),
    "deep water": ("under water", "in deep water", "deep water"),
    "grass": ("on grass", "on a green lawn", "tall grass"),
    "meadow": ("in a meadow", "on a green hill", "a meadow"),
    "forest": ("in a forest", "among dark trees", "a forest"),
    "desert": ("in the desert", "on the dunes", "a desert"),
    "sand": ("on sand", "on the beach", "sand"),
    "snow": ("in the snow", "in winter", "snow"),
    "brick": ("in front of bricks", "on a brick wall", "a brick wall"),
    "wood": ("on a wooden table", "on brown planks", "a wooden table"),
    "stone": ("on a rock", "on grey stone", "grey stone"),
    "tiles": ("on a tiled floor", "on tiles", "a tiled floor"),
    "curtain": ("in front of a curtain", "on a stage", "a curtain"),
}
"""Place -> two ways to say where, and a noun."""

NO_ARTICLE = """
cherries blueberries grapes bread pancakes bacon spaghetti sushi popcorn butter milk coffee beer lemonade maracas skis
glasses goggles jeans socks gloves shorts books scissors coral garlic broccoli corn stew shoes fries dolls
"""
"""Last words of names that take no article (plurals and stuff)."""

TEMPLATE_WORDS = """
a an and with of in on at the big small picture next to behind it them left right above below middle top bottom
"""


def _with_article(words: str) -> str:
    """Return ``words`` with "a" or "an" before it where English wants one."""
    if words.split()[-1] in NO_ARTICLE.split():
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
    where, where_else, noun = PLACE_PHRASES[scene.place]
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
    words = set(TEMPLATE_WORDS.split())
    for phrases in PLACE_PHRASES.values():
        words |= {word for phrase in phrases for word in phrase.split()}
    return tuple(sorted(words | {word for sprite in sprites() for word in sprite.name.split()}))
