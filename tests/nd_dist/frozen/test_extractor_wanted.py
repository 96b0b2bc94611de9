from __future__ import annotations

import numpy as np
import pytest

from nd_dist.config import FrozenConfig
from nd_dist.errors import DataError
from nd_dist.frozen.clip_vision import ClipVision
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.frozen.stable_diffusion import StableDiffusion


@pytest.mark.parametrize("wanted", [("z",), ("c",), ("g02", "g12"), ("z", "g04"), ()])
def test_only_wanted_targets_are_made_and_they_are_bit_equal_to_those_of_all(
    sd: StableDiffusion, clip: ClipVision, wanted: tuple[str, ...]
) -> None:
    extractor = FrozenExtractor(sd, clip, FrozenConfig(), seed=5)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), dtype=np.uint8)
    captions = [["a cat", "a dog"], ["one bird"], ["x y z"]]
    everything = extractor.extract(pictures, captions, [10, 3, 77])
    found = extractor.extract(pictures, captions, [10, 3, 77], wanted)
    assert set(found) == set(wanted)
    for name, values in found.items():
        np.testing.assert_array_equal(values, everything[name])


def test_captions_are_needed_only_where_c_is_wanted(sd: StableDiffusion, clip: ClipVision) -> None:
    extractor = FrozenExtractor(sd, clip, FrozenConfig(), seed=5)
    picture = np.zeros((1, 50, 40, 3), dtype=np.uint8)
    assert set(extractor.extract(picture, [()], [3], ("z",))) == {"z"}
    with pytest.raises(DataError, match="no caption"):
        extractor.extract(picture, [()], [3], ("z", "c"))
