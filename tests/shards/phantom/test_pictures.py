from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from nd_dist.errors import ConfigError
from shards.phantom.backgrounds import PLACES, SIZE, noise, paint
from shards.phantom.captions import captions_of, vocabulary
from shards.phantom.pictures import PictureWorld, evaluation_scene, render, training_scene
from shards.phantom.scenes import candidates, compose, held_out_objects, held_out_places, kind_of
from shards.phantom.sprites import DATA_DIR, sprites


def digest_of(world: PictureWorld, image_ids: range) -> str:
    digest = hashlib.sha256()
    for image_id in image_ids:
        digest.update(world.picture(image_id).tobytes())
        digest.update("|".join(world.captions(image_id)).encode())
    return digest.hexdigest()


def test_pictures_and_captions_are_the_same_bytes_in_another_process() -> None:
    program = (
        "from tests.shards.phantom.test_pictures import digest_of; from shards.phantom.pictures import PictureWorld;"
        "print(digest_of(PictureWorld(5, 64, 8), range(64)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert digest_of(PictureWorld(5, 64, 8), range(64)) == other


def test_a_picture_depends_on_seed_and_image_id_but_not_on_how_many_there_are() -> None:
    world = PictureWorld(0, 10)
    assert np.array_equal(world.picture(3), PictureWorld(0, 1000).picture(3))
    assert not np.array_equal(world.picture(3), world.picture(4))
    assert not np.array_equal(world.picture(3), PictureWorld(1, 10).picture(3))


def test_a_picture_is_a_small_rgb_array_and_has_five_different_captions() -> None:
    world = PictureWorld(0, 50)
    for image_id in range(50):
        picture, captions = world.picture(image_id), world.captions(image_id)
        assert picture.shape == (SIZE, SIZE, 3) == (world.size, world.size, 3)
        assert picture.dtype == np.uint8
        assert len(set(captions)) == 5
        assert all(thing.name in caption for caption in captions[:1] for thing in world.scene(image_id).things)


def test_every_caption_word_is_in_the_vocabulary_and_captions_stay_short() -> None:
    words = set(vocabulary())
    for number in range(500):
        for caption in captions_of(training_scene(1, 0, number)):
            assert set(caption.split()) <= words
            assert len(caption.split()) <= 22


def test_no_training_scene_and_no_ordinary_picture_shows_anything_held_out() -> None:
    world = PictureWorld(2, 1500, 100)
    ordinary = [world.scene(image_id) for image_id in set(range(1500)) - set(world.shared_ids)]
    training = [training_scene(7, step, row) for step in range(100) for row in range(20)]
    for scene in [*ordinary, *training]:
        assert scene.held_out == "no"
        assert not held_out_objects() & {thing.name for thing in scene.things}
        assert all(scene.place not in held_out_places(thing.name) for thing in scene.things)


def test_shared_pictures_show_held_out_combinations_and_a_quarter_of_them_held_out_objects() -> None:
    world = PictureWorld(2, 1500, 100)
    scenes = [world.scene(image_id) for image_id in world.shared_ids]
    assert sum(scene.held_out == "object" for scene in scenes) == 25
    assert sum(scene.held_out == "combination" for scene in scenes) == 75
    for scene in scenes:
        assert {kind_of(thing.name, scene.place) for thing in scene.things} == {scene.held_out}


def test_the_shared_ids_are_ascending_and_too_many_are_refused() -> None:
    assert PictureWorld(0, 30, 30).shared_ids == tuple(range(30))
    assert PictureWorld(0, 30).shared_ids == ()
    with pytest.raises(ConfigError, match="num_shared"):
        PictureWorld(0, 30, 31)


@pytest.mark.parametrize("image_id", [-1, 10])
def test_an_image_id_outside_the_world_is_refused(image_id: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.9"):
        PictureWorld(0, 10).picture(image_id)


def test_the_three_kinds_of_scenes_split_the_objects_of_every_place() -> None:
    for place in PLACES:
        pools = [set(candidates(place, kind)) for kind in ("no", "combination", "object")]
        assert sum(map(len, pools)) == len(sprites()) == len(set.union(*pools))
        assert min(map(len, pools)) >= 2
    assert 0.05 < len(held_out_objects()) / len(sprites()) < 0.12


def test_things_lie_inside_the_picture_and_two_things_do_not_overlap() -> None:
    pairs = 0
    for seed in range(1000):
        things = compose(seed).things
        for thing in things:
            assert 0 <= thing.left <= SIZE - thing.side
            assert 0 <= thing.top <= SIZE - thing.side
        if len(things) == 2:
            first, second = things
            across = first.left + first.side <= second.left or second.left + second.side <= first.left
            down = first.top + first.side <= second.top or second.top + second.side <= first.top
            assert across or down
            assert first.side >= second.side
            assert first.name != second.name
            pairs += 1
    assert 200 < pairs < 400


def test_captions_say_truly_where_things_are() -> None:
    for number in range(400):
        scene = evaluation_scene(0, number, "no")
        caption = captions_of(scene)[1]
        first = scene.things[0]
        if len(scene.things) == 1 and "on the left" in caption:
            assert 2 * first.left + first.side < SIZE
        if len(scene.things) == 2 and " left of " in caption:
            assert first.left < scene.things[1].left
        if len(scene.things) == 2 and " below " in caption:
            assert first.top > scene.things[1].top


def test_a_thing_changes_the_picture_where_it_stands_and_its_shadow_falls_only_beside_it() -> None:
    scene = next(scene for scene in map(compose, range(100)) if len(scene.things) == 1)
    rng = np.random.Generator(np.random.PCG64(scene.seed))
    changed = (render(scene) != paint(scene.place, rng)).any(axis=2)
    thing = scene.things[0]
    inside = np.zeros_like(changed)
    inside[thing.top : thing.top + thing.side + 2, thing.left : thing.left + thing.side + 1] = True
    assert changed[inside].mean() > 0.2
    assert not changed[~inside].any()


@pytest.mark.parametrize("place", PLACES)
def test_every_place_looks_different_each_time_and_uses_the_whole_size(place: str) -> None:
    first, second = (paint(place, np.random.Generator(np.random.PCG64(seed))) for seed in (1, 2))
    assert first.shape == (SIZE, SIZE, 3)
    assert not np.array_equal(first, second)
    assert first.std() > 2


def test_noise_is_exact_whatever_order_its_sums_are_taken_in() -> None:
    rng, again = (np.random.Generator(np.random.PCG64(3)) for _ in range(2))
    from shards.phantom.backgrounds import _smooth

    grid = again.integers(-128, 128, (6, 10)).astype(np.int64)
    exact = _smooth(5).astype(np.int64) @ grid @ _smooth(9).astype(np.int64).T
    assert np.array_equal(noise(rng, 5, 9).astype(np.float64), exact / (1 << 23))


def test_the_sprite_pack_is_small_named_uniquely_and_licensed() -> None:
    names = [sprite.name for sprite in sprites()]
    assert 300 <= len(names) == len(set(names)) <= 800
    assert all(name.replace(" ", "").isalpha() and name == name.lower() for name in names)
    assert sum(path.stat().st_size for path in DATA_DIR.iterdir()) < 4e6
    licences = (DATA_DIR / "LICENSES.md").read_text()
    assert all(path.name in licences for path in DATA_DIR.iterdir() if path.name != "LICENSES.md")
