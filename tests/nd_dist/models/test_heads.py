from __future__ import annotations

import pytest
import torch

from nd_dist.config import DecoderConfig
from nd_dist.errors import CheckpointError, ConfigError
from nd_dist.models.draws import Draws
from nd_dist.models.heads import LatentHead, TokenHead
from nd_dist.models.released import latent_head_state, prior_state, token_head_state
from nd_dist.schema import TargetSpec

CONFIG = DecoderConfig(hidden_size=12, num_blocks=2, initial_channels=(8, 12, 20))


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 8, 12), (3, 64, 64)])
def test_the_latent_head_makes_any_latent_whose_sides_divide_by_four(shape: tuple[int, int, int]) -> None:
    head = LatentHead(CONFIG, TargetSpec("z", "initial", shape), shared=False, student=True)
    output = head(torch.randn(2, 12))
    assert output.latent_BCHW.shape == (2, *shape)
    assert output.student_BPD is not None
    assert output.student_BPD.shape == (2, shape[1] * shape[2] // 16, 512)


def test_a_latent_that_the_up_blocks_cannot_make_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"divisible by 4"):
        LatentHead(CONFIG, TargetSpec("z", "initial", (4, 10, 16)), shared=False)
    with pytest.raises(ConfigError, match=r"tokens, width"):
        TokenHead(CONFIG, TargetSpec("c", "semantic", (4, 10, 16)))


def test_the_student_map_exists_only_with_a_teacher() -> None:
    spec = TargetSpec("z", "initial", (4, 8, 8))
    plain = LatentHead(CONFIG, spec, shared=False)
    assert plain(torch.randn(1, 12)).student_BPD is None
    assert not [name for name in plain.state_dict() if name.startswith("student")]


def test_a_residual_block_and_the_entry_norm_follow_their_formulas() -> None:
    head = LatentHead(CONFIG, TargetSpec("z", "initial", (4, 8, 8)), shared=True)
    x = torch.randn(3, 12)
    block = head.blocks[0]
    hidden = torch.nn.functional.layer_norm(x @ block.linear.weight.T, (12,))
    torch.testing.assert_close(block(x), hidden * torch.sigmoid(hidden) + x)
    assert head.entry_norm is not None
    assert not torch.allclose(head(x).latent_BCHW, head(x, Draws(0, 0, torch.arange(3))).latent_BCHW)


def test_the_published_latent_head_has_the_published_size() -> None:
    for hidden, published in ((1024, 28_381_124), (4096, 141_651_908)):
        with torch.device("meta"):
            spec = TargetSpec("z", "initial", (4, 64, 64))
            head = LatentHead(DecoderConfig(hidden_size=hidden), spec, shared=False, student=True)
        assert sum(p.numel() for p in head.parameters()) == published


def test_unknown_released_names_are_refused() -> None:
    for rename in (token_head_state, latent_head_state, prior_state):
        with pytest.raises(CheckpointError, match="not known"):
            rename({"surprise.weight": torch.zeros(1)})


def test_released_latent_weights_fill_the_latent_head_completely() -> None:
    head = LatentHead(CONFIG, TargetSpec("z", "initial", (4, 8, 8)), shared=False, student=True)
    names = {"blocks": "mlp", "linear": "lin1", "norm": "norm", "upsampler": "upsampler", "student": "maps_projector"}
    released = {}
    for own, value in head.state_dict().items():
        first, rest = own.split(".", 1)
        if first == "blocks":
            rest = rest.replace(".linear.", ".0.").replace(".norm.", ".1.")
        released[f"{names[first]}.{rest}"] = value
    assert latent_head_state(released).keys() == head.state_dict().keys()
