"""Backgrounds drawn from gradients and smooth noise: sixteen places, each a function of a random generator.

Arithmetic is exact (small integers in float32, whose products stay below 2**24), so a picture has the same bytes on
every machine.

Notation: HW3 float32 image with values 0..255, HW one channel, SIZE pixels on each side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.floating[Any]]  # float32 throughout; NumPy's stubs widen float32 / int
Color = tuple[int, int, int]

SIZE = 64
ROWS = np.arange(SIZE, dtype=np.float32)[:, None]
COLUMNS = np.arange(SIZE, dtype=np.float32)[None, :]


@cache
def _smooth(cells: int) -> Image:
    """Return (SIZE, cells + 1) smoothstep interpolation weights in whole 1/256."""
    position = (np.arange(SIZE) + 0.5) * cells / SIZE
    cell = np.floor(position).astype(int)
    share = position - cell
    share = np.rint(256 * share * share * (3 - 2 * share))
    weights = np.zeros((SIZE, cells + 1), dtype=np.float32)
    weights[np.arange(SIZE), cell] = 256 - share
    weights[np.arange(SIZE), cell + 1] = share
    return weights


def noise(rng: np.random.Generator, rows: int, columns: int) -> Image:
    """Return (SIZE, SIZE) smooth noise in [-1, 1) with so many cells down and across."""
    grid = rng.integers(-128, 128, (rows + 1, columns + 1)).astype(np.float32)
    return np.asarray(_smooth(rows) @ grid @ _smooth(columns).T / np.float32(1 << 23), dtype=np.float32)


def color(rng: np.random.Generator, base: Color, jitter: int = 16) -> Image:
    """Return a (3,) colour near ``base``: brightness and each channel move by up to ``jitter``."""
    shift = rng.integers(-jitter, jitter + 1, 4).astype(np.float32)
    return np.asarray(np.array(base, dtype=np.float32) + shift[3] + shift[:3] / 2, dtype=np.float32)


def blend(first: Image, second: Image, share: Image) -> Image:
    """Return ``first`` where ``share`` (SIZE, SIZE) is 0 and ``second`` where it is 1, as HW3."""
    weight = np.clip(share, 0, 1)[..., None]
    return np.asarray(first * (1 - weight) + second * weight, dtype=np.float32)


def gradient(top: Image, bottom: Image) -> Image:
    """Return HW3 that goes from one colour at the top to another at the bottom."""
    return blend(top, bottom, np.broadcast_to(ROWS / np.float32(SIZE - 1), (SIZE, SIZE)))


def _edge(line: Image, softness: float = 1.5) -> Image:
    """Return 0 above the row number ``line`` (1 or SIZE columns) and 1 below it, with a soft edge."""
    return np.asarray(np.clip((ROWS - line) / np.float32(softness), 0, 1) * np.ones_like(COLUMNS), dtype=np.float32)


def _dots(rng: np.random.Generator, image: Image, count: int, bright: Color, first_row: int = 0) -> Image:
    """Set ``count`` random pixels of ``image`` to about ``bright``."""
    rows, columns = rng.integers(first_row, SIZE, count), rng.integers(0, SIZE, count)
    image[rows, columns] = color(rng, bright) - rng.integers(0, 90, (count, 1)).astype(np.float32)
    return image


def _horizon(rng: np.random.Generator, low: int, high: int, roughness: int) -> Image:
    """Return a (1, SIZE) line of row numbers between ``low`` and ``high``, wavy by up to ``roughness`` rows."""
    return np.asarray(rng.integers(low, high) + roughness * noise(rng, 1, 4)[:1], dtype=np.float32)


def sky(rng: np.random.Generator) -> Image:
    """Blue above, pale below, with clouds."""
    image = gradient(color(rng, (64, 128, 218)), color(rng, (168, 212, 244)))
    clouds = noise(rng, 4, 3) + noise(rng, 10, 7) / 2
    return blend(image, color(rng, (246, 248, 252), 6), clouds - np.float32(0.125))


def sunset(rng: np.random.Generator) -> Image:
    """Violet above, orange below, with long clouds."""
    image = gradient(color(rng, (96, 62, 130)), color(rng, (250, 160, 84)))
    clouds = noise(rng, 9, 2) + noise(rng, 16, 4) / 2
    return blend(image, color(rng, (236, 98, 92)), clouds * np.float32(0.75))


def night(rng: np.random.Generator) -> Image:
    """Dark blue with stars."""
    image = gradient(color(rng, (10, 14, 44), 8), color(rng, (40, 40, 92), 10))
    image = blend(image, color(rng, (70, 50, 120)), noise(rng, 3, 3) / 2)
    return _dots(rng, image, 40, (235, 235, 225))


def sea(rng: np.random.Generator) -> Image:
    """A strip of sky over waves."""
    air = gradient(color(rng, (120, 176, 226)), color(rng, (206, 228, 240)))
    water = gradient(color(rng, (52, 128, 178)), color(rng, (16, 62, 122)))
    water = blend(water, color(rng, (150, 200, 222)), (noise(rng, 26, 5) + noise(rng, 14, 3)) / 2)
    return blend(air, water, _edge(np.full((1, SIZE), rng.integers(8, 22), dtype=np.float32)))


def deep_water(rng: np.random.Generator) -> Image:
    """Turquoise above, dark below, with rays of light."""
    image = gradient(color(rng, (70, 190, 200)), color(rng, (6, 52, 104)))
    rays = noise(rng, 1, 9) * (1 - ROWS / SIZE)
    return blend(image, color(rng, (170, 236, 226)), rays * np.float32(0.75))


def grass(rng: np.random.Generator) -> Image:
    """Green blades."""
    image = gradient(color(rng, (104, 168, 62)), color(rng, (60, 122, 40)))
    blades = noise(rng, 10, 20) + noise(rng, 4, 5) / 2
    return image + blades[..., None] * np.array([36, 40, 22], dtype=np.float32)


def meadow(rng: np.random.Generator) -> Image:
    """A green hill with flowers under the sky."""
    air = gradient(color(rng, (104, 166, 228)), color(rng, (208, 230, 244)))
    hill = gradient(color(rng, (150, 196, 88)), color(rng, (74, 142, 52))) + 14 * noise(rng, 20, 20)[..., None]
    line = _horizon(rng, 22, 40, 6)
    return _dots(rng, blend(air, hill, _edge(line)), 26, ((252, 226, 120), (250, 240, 250))[rng.integers(2)], 44)


def forest(rng: np.random.Generator) -> Image:
    """Dark leaves and trunks."""
    image = blend(color(rng, (22, 58, 34)), color(rng, (84, 138, 60)), (noise(rng, 7, 7) + noise(rng, 14, 14) + 1) / 2)
    trunks = np.abs(noise(rng, 1, 8)) < np.float32(0.125)
    return blend(image, color(rng, (70, 48, 32)), trunks * np.float32(0.75))


def desert(rng: np.random.Generator) -> Image:
    """Dunes under a pale sky."""
    image = gradient(color(rng, (142, 190, 222)), color(rng, (244, 226, 190)))
    for low, high, base in ((16, 28, (226, 178, 108)), (30, 42, (212, 152, 80)), (46, 58, (188, 122, 60))):
        dune = color(rng, base) + 6 * noise(rng, 24, 6)[..., None]
        image = blend(image, dune, _edge(_horizon(rng, low, high, 9)))
    return image


def sand(rng: np.random.Generator) -> Image:
    """Fine light grains with ripples."""
    grain = rng.integers(-6, 7, (SIZE, SIZE)).astype(np.float32)
    ripples = noise(rng, 18, 3) * 16 + noise(rng, 3, 3) * 14
    return gradient(color(rng, (236, 212, 164)), color(rng, (216, 184, 132))) + (grain + ripples)[..., None]


def snow(rng: np.random.Generator) -> Image:
    """Soft white drifts with flakes."""
    image = gradient(color(rng, (214, 226, 240), 10), color(rng, (244, 247, 252), 6))
    image = image - (24 * np.abs(noise(rng, 5, 3)))[..., None] * np.array([1, 0.75, 0.25], dtype=np.float32)
    return _dots(rng, image, 30, (255, 255, 255))


def brick(rng: np.random.Generator) -> Image:
    """Courses of bricks with mortar."""
    height, width = int(rng.integers(7, 11)), int(rng.integers(14, 20))
    rows, columns = np.arange(SIZE)[:, None], np.arange(SIZE)[None, :]
    course = rows // height
    shifted = columns + (course % 2) * (width // 2)
    mortar = (rows % height == 0) | (shifted % width == 0)
    tone = rng.integers(-22, 23, (SIZE, SIZE)).astype(np.float32)[course, shifted // width]
    wall = color(rng, (172, 84, 66)) + (tone + 8 * noise(rng, 16, 16))[..., None]
    return blend(wall, color(rng, (206, 196, 186)), mortar * np.float32(0.875))


def wood(rng: np.random.Generator) -> Image:
    """Planks with grain."""
    height = int(rng.integers(10, 17))
    plank = np.arange(SIZE) // height
    tone = rng.integers(-20, 21, SIZE).astype(np.float32)[plank][:, None]
    image = color(rng, (170, 118, 70)) + (tone + 22 * noise(rng, 30, 3))[..., None]
    gap = np.broadcast_to((np.arange(SIZE) % height == 0)[:, None], (SIZE, SIZE))
    return blend(image, color(rng, (84, 54, 32)), gap * np.float32(0.75))


def stone(rng: np.random.Generator) -> Image:
    """Grey rock with cracks."""
    tone = 40 * noise(rng, 5, 5) + 24 * noise(rng, 13, 13)
    image = color(rng, (134, 132, 130)) + tone[..., None]
    cracks = np.abs(noise(rng, 6, 6) + noise(rng, 14, 14) / 2) < np.float32(0.03125)
    return blend(image, color(rng, (62, 60, 60)), cracks * np.float32(0.625))


def tiles(rng: np.random.Generator) -> Image:
    """A chequered floor, light and one dark colour."""
    side, start = int(rng.integers(10, 18)), rng.integers(0, 16, 2)
    rows, columns = np.arange(SIZE)[:, None] + start[0], np.arange(SIZE)[None, :] + start[1]
    chequer = ((rows // side + columns // side) % 2).astype(np.float32)
    dark = ((60, 92, 124), (60, 112, 92), (118, 70, 84), (74, 74, 80))[rng.integers(4)]
    joint = ((rows % side == 0) | (columns % side == 0)) * np.float32(0.5)
    image = blend(color(rng, (232, 228, 218), 8), color(rng, dark), chequer)
    return blend(image, color(rng, (190, 186, 180)), joint) + 10 * noise(rng, 3, 3)[..., None]


def curtain(rng: np.random.Generator) -> Image:
    """Vertical folds of cloth in one of four colours."""
    cloth = ((170, 34, 48), (112, 52, 140), (34, 100, 110), (200, 150, 60))[rng.integers(4)]
    folds = noise(rng, 1, 7) * 44 + noise(rng, 2, 16) * 16
    return color(rng, cloth) + folds[..., None]


PLACES: dict[str, Callable[[np.random.Generator], Image]] = {
    "sky": sky,
    "sunset": sunset,
    "night": night,
    "sea": sea,
    "deep water": deep_water,
    "grass": grass,
    "meadow": meadow,
    "forest": forest,
    "desert": desert,
    "sand": sand,
    "snow": snow,
    "brick": brick,
    "wood": wood,
    "stone": stone,
    "tiles": tiles,
    "curtain": curtain,
}
"""Name -> painter; a place's position is its class index in every network."""


def paint(place: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a (64, 64, 3) uint8 background of a place."""
    image = np.broadcast_to(PLACES[place](rng), (SIZE, SIZE, 3))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
