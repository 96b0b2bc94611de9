"""Controls: nobody keeps its own targets, and the nearest training image is really the nearest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nd_dist.evaluation.reconstruction import controls
from nd_dist.evaluation.reconstruction.controls import ShuffledTargets, nearest_images, shuffled_images
from nd_dist.evaluation.reconstruction.decode import TrueTargets
from tests.nd_dist.evaluation.toy_world import ToySource


@given(st.sets(st.integers(0, 72_999), min_size=2, max_size=40), st.integers(0, 9))
def test_shuffling_gives_every_image_another_ones_targets_and_uses_all(ids: set[int], seed: int) -> None:
    source_of = shuffled_images(sorted(ids), seed)
    assert set(source_of) == set(source_of.values()) == ids
    assert all(image_id != source for image_id, source in source_of.items())
    assert source_of == shuffled_images(sorted(ids, reverse=True), seed), "the order of the list does not matter"


def test_shuffled_targets_are_those_of_the_stand_in() -> None:
    source = ToySource()
    shuffled = ShuffledTargets(TrueTargets(source), {0: 2, 1: 0, 2: 1})
    assert (shuffled.rows("c", [0, 2]) == source.targets("c", [2, 1])).all()


class Given:
    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def rows(self, name: str, image_ids: list[int]) -> np.ndarray:  # type: ignore[type-arg]
        return self._rows[image_ids]


def test_the_nearest_image_has_the_largest_cosine_however_images_are_blocked(monkeypatch: object) -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal((23, 3, 4)).astype(np.float32)
    predicted = true[[4, 9, 20]] * 5 + 0.01
    for block in (1, 4, 128):
        controls.BLOCK_IMAGES = block
        *_, found = nearest_images(Given(predicted), Given(true), "c", [0, 1, 2], list(range(23)))  # type: ignore[arg-type]
        assert found == {0: 4, 1: 9, 2: 20}
