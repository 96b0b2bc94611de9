"""The token backbone: shapes, what it can express, and that a sample's numbers do not depend on its batch."""

from __future__ import annotations

import pytest
import torch

from nd_dist.config import DecoderConfig
from nd_dist.errors import ConfigError
from nd_dist.models.brain_tokens import TokenBackbone
from nd_dist.models.draws import Draws


def backbone(**settings: object) -> TokenBackbone:
    torch.manual_seed(3)
    config = DecoderConfig.model_validate(
        {"kind": "tokens", "hidden_size": 128, "brain_tokens": 4, "num_blocks": 2, **settings}
    )
    return TokenBackbone(config, (5, 12), "c")


def test_a_samples_tokens_do_not_depend_on_its_batch() -> None:
    network, x = backbone(), torch.randn(6, 1, 128)
    together = network(x, Draws(1, 2, torch.arange(6)))
    alone = network(x[2:3], Draws(1, 2, torch.tensor([2])))
    assert together.shape == (6, 5, 12)
    torch.testing.assert_close(together[2:3], alone)
    assert not torch.allclose(together, network(x))  # dropout is on in training only


def test_it_is_not_affine() -> None:
    network = backbone()
    one, two = torch.randn(2, 3, 1, 128)
    with torch.no_grad():
        middle, ends = network((one + two) / 2), (network(one) + network(two)) / 2
    assert float((middle - ends).abs().max()) > 1e-3


def test_every_brain_token_and_every_weight_has_a_gradient() -> None:
    network, x = backbone(), torch.randn(4, 1, 128, requires_grad=True)
    network(x).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad.view(4, 4, 32).abs().amax(dim=(0, 2)) > 0).all())
    assert all(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in network.parameters())


def test_a_width_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="brain_tokens"):
        backbone(brain_tokens=3)
