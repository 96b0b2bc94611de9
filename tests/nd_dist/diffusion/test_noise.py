from __future__ import annotations

from typing import Literal

import pytest
import torch

from nd_dist.diffusion.noise import NoiseRequest, draw_noise
from nd_dist.errors import ConfigError
from nd_dist.seeds import unit_seed

SHAPE = (4, 8, 8)


def test_noise_depends_on_the_unit_and_not_on_its_batch() -> None:
    requests = [NoiseRequest(image, repeat, 7) for image in (3, 5) for repeat in range(3)]
    together = draw_noise(requests, SHAPE)
    assert together.shape == (6, *SHAPE)
    for row, request in enumerate(requests):
        assert torch.equal(draw_noise([request], SHAPE)[0], together[row])
    assert len({tuple(values.flatten()[:4].tolist()) for values in together}) == 6


def test_a_unit_s_seed_is_made_of_run_image_and_repeat() -> None:
    seed = unit_seed(7, "noise", 3, 1)
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw_noise([NoiseRequest(3, 1, 7)], SHAPE)[0], expected)
    assert not torch.equal(draw_noise([NoiseRequest(3, 1, 8)], SHAPE)[0], expected)


def test_official_noise_is_draw_41_r_of_seed_42_for_every_image() -> None:
    generator = torch.Generator().manual_seed(42)
    stream = [torch.randn(1, *SHAPE, generator=generator)[0] for _ in range(165)]
    requests = [NoiseRequest(image, repeat, 0) for image in (1, 2) for repeat in range(5)]
    drawn = draw_noise(requests, SHAPE, "official")
    for row, request in enumerate(requests):
        assert torch.equal(drawn[row], stream[41 * request.repeat])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("kind", ["per_image", "official"])
def test_a_gpu_s_noise_is_refused_where_there_is_no_gpu(kind: Literal["per_image", "official"]) -> None:
    with pytest.raises(ConfigError, match="noise_device"):
        draw_noise([NoiseRequest(0, 0, 0)], SHAPE, kind, torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_official_noise_is_draw_41_r_of_its_own_stream() -> None:
    generator = torch.Generator("cuda").manual_seed(42)
    stream = [torch.randn(1, *SHAPE, generator=generator, device="cuda")[0] for _ in range(42)]
    requests = [NoiseRequest(0, 0, 0), NoiseRequest(0, 1, 0)]
    drawn = draw_noise(requests, SHAPE, "official", torch.device("cuda"))
    assert torch.equal(drawn, torch.stack([stream[0], stream[41]]))
