"""The picture world: image ids to 64x64 pictures, captions and scenes, each a function of (seed, image_id) alone.

Also the endless stream of training pictures for the phantom's networks, whose scenes never are a world's test scenes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from nd_dist.errors import ConfigError
from nd_dist.seeds import unit_seed
from shards.phantom.backgrounds import SIZE, paint
from shards.phantom.captions import captions_of
from shards.phantom.scenes import HeldOut, Scene, Thing, compose
from shards.phantom.sprites import sprite_index, sprites

HELD_OUT_OBJECT_EVERY = 4
"""One shared picture in so many shows held-out objects, the others held-out combinations."""
SHADOW = 88
"""Darkness of a thing's shadow, of 255."""


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Returns:
        (64, 64, 3) uint8 RGB; the same bytes on every machine.
    """
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    picture = paint(scene.place, rng).astype(np.int32)
    light = int(rng.integers(216, 272))  # of 256
    for thing in scene.things:
        _paste(picture, thing, light)
    return picture.astype(np.uint8)


@lru_cache(maxsize=16_384)
def _scaled(name: str, side: int) -> npt.NDArray[np.uint8]:
    """Return a sprite at another size, (side, side, 4) uint8."""
    sprite = Image.fromarray(sprites()[sprite_index()[name]].rgba)
    return np.asarray(sprite.resize((side, side), Image.Resampling.BILINEAR))


def _paste(picture: npt.NDArray[np.int32], thing: Thing, light: int) -> None:
    """Blend a thing with its shadow into ``picture`` (64, 64, 3), values 0..255, in place, in whole numbers."""
    rgba = _scaled(thing.name, thing.side)[:, :: -1 if thing.flipped else 1].astype(np.int32)
    color, alpha = np.minimum(rgba[..., :3] * light // 256, 255), rgba[..., 3:]
    down, right = min(2, SIZE - thing.top - thing.side), min(1, SIZE - thing.left - thing.side)
    for offset_y, offset_x, pasted, opacity in ((down, right, 0, alpha * SHADOW // 255), (0, 0, color, alpha)):
        rows = slice(thing.top + offset_y, thing.top + offset_y + thing.side)
        columns = slice(thing.left + offset_x, thing.left + offset_x + thing.side)
        picture[rows, columns] += (pasted - picture[rows, columns]) * opacity // 255


class PictureWorld:
    """The pictures that the subjects of a phantom see.

    Args:
        seed: Seed of the world; another seed is another set of pictures of the same things and places.
        num_images: Number of image ids, 0 .. num_images - 1.
        num_shared: How many of them are shared test pictures: three in four show combinations of object and place
            that no training picture shows, every fourth shows held-out objects.

    Raises:
        ConfigError: more shared pictures than pictures.
    """

    def __init__(self, seed: int, num_images: int, num_shared: int = 0) -> None:
        if not 0 <= num_shared <= num_images:
            raise ConfigError("num_shared must lie in 0..num_images.", expected=f"0..{num_images}", found=num_shared)
        self.seed, self.num_images = seed, num_images
        order = np.random.Generator(np.random.PCG64(unit_seed(seed, "shared"))).permutation(num_images)[:num_shared]
        self._kind: dict[int, HeldOut] = {
            int(image_id): "object" if rank % HELD_OUT_OBJECT_EVERY == 0 else "combination"
            for rank, image_id in enumerate(order)
        }

    @property
    def size(self) -> int:
        """Pixels on each side of a picture."""
        return SIZE

    @property
    def shared_ids(self) -> tuple[int, ...]:
        """Image ids of the shared test pictures, ascending."""
        return tuple(sorted(self._kind))

    def scene(self, image_id: int) -> Scene:
        """Return the scene of an image id.

        Raises:
            IndexError: the id is not one of this world's.
        """
        if not 0 <= image_id < self.num_images:
            raise IndexError(f"image id {image_id} is not in 0..{self.num_images - 1}")
        return compose(unit_seed(self.seed, "picture", image_id), self._kind.get(image_id, "no"))

    def picture(self, image_id: int) -> npt.NDArray[np.uint8]:
        """Return the picture of an image id, (64, 64, 3) uint8 RGB."""
        return render(self.scene(image_id))

    def captions(self, image_id: int) -> tuple[str, ...]:
        """Return the five captions of an image id."""
        return captions_of(self.scene(image_id))


def training_scene(seed: int, step: int, row: int) -> Scene:
    """Return the scene of one row of one step of the networks' training stream; never anything held out."""
    return compose(unit_seed(seed, "train", step, row))


def evaluation_scene(seed: int, number: int, held_out: HeldOut) -> Scene:
    """Return scene ``number`` of the networks' own evaluation, of a given kind."""
    return compose(unit_seed(seed, "evaluate", number), held_out)
