"""Layers divided by columns, in a world of one; two and four real ranks are in tests/ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nd_dist.config import DecoderConfig
from nd_dist.errors import CheckpointError
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec
from nd_dist.training.engine.sharded import Columns, ShardedLinear, pays, shard_large_layers
from nd_dist.world import World

CPU = torch.device("cpu")
SPECS = [TargetSpec("c", "semantic", (6, 16)), TargetSpec("z", "initial", (4, 8, 8))]


@pytest.mark.parametrize(("num", "size"), [(8, 1), (8, 3), (7, 4), (2, 4), (8, 5)])
def test_every_column_has_one_owner_and_every_rank_equally_many_with_zeros_at_the_end(num: int, size: int) -> None:
    whole, parts = torch.arange(1.0, 1 + 3 * num).view(num, 3), []
    for rank in range(size):
        columns = Columns(World(rank, size), num)
        part = columns.part(whole)
        start, stop = columns.own
        assert part.shape == (columns.per_rank, 3)
        assert not part[stop - start :].any()
        parts.append(part[: stop - start])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layer_and_add_up_until_forgotten(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3, bias=bias)
    layer = ShardedLinear(linear, World(), CPU)
    rows = torch.randn(4, 2, 5, requires_grad=True)
    for times in (1, 2):
        expected, found = linear(rows), layer(rows)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(expected.square().sum(), rows, retain_graph=True)
        expected.square().sum().backward(inputs=list(linear.parameters()))
        (own,) = torch.autograd.grad(found.square().sum(), rows)
        torch.testing.assert_close(own, gradient)
        for name, parameter in linear.named_parameters():
            torch.testing.assert_close(layer.own[name].grad, parameter.grad, msg=f"{name}, {times} times")
    layer.forget()
    layer(rows).sum().backward()
    linear.zero_grad()
    linear(rows).sum().backward()
    torch.testing.assert_close(layer.own["weight"].grad, linear.weight.grad)


def test_a_layer_of_a_half_precision_network_keeps_float32_weights_and_gradients() -> None:
    layer = ShardedLinear(nn.Linear(5, 3), World(), CPU)
    found = layer(torch.randn(4, 5, dtype=torch.bfloat16))
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert layer.own["weight"].dtype == layer.own["weight"].grad.dtype == torch.float32  # type: ignore[union-attr]


def test_a_half_precision_copy_lasts_until_the_weights_change() -> None:
    layer = ShardedLinear(nn.Linear(5, 3), World(), CPU)
    copies = layer.in_precision(torch.bfloat16)
    assert layer.in_precision(torch.bfloat16) is copies
    layer.own["weight"].data += 1
    layer.forget()
    assert torch.equal(layer.in_precision(torch.bfloat16)["weight"], layer.own["weight"].bfloat16())
    assert layer.in_precision(torch.float32)["weight"] is layer.own["weight"]


def test_deepspeed_sees_no_parameter_of_a_divided_layer() -> None:
    assert list(ShardedLinear(nn.Linear(5, 3), World(), CPU).parameters()) == []


def decoder() -> Decoder:
    config = DecoderConfig(hidden_size=64, num_blocks=1, initial_channels=(8, 16, 16), prior_depth=1, prior_dim_head=8)
    return Decoder(
        config, {1: 80, 2: 90}, [TargetSpec("c", "semantic", (6, 16)), TargetSpec("z", "initial", (4, 8, 8))]
    )


def test_voxel_encoders_and_row_layers_are_divided_and_token_layers_are_not() -> None:
    chosen = set(shard_large_layers(decoder(), 8, World(), CPU))
    assert chosen == {
        "voxels.shared.subjects.1", "voxels.shared.subjects.2", "heads.c.backbone.linear", "heads.z.blocks.0.linear",
        "heads.z.linear",
    }  # fmt: skip


def test_a_large_batch_is_cheaper_to_keep_at_home() -> None:
    assert pays(4096, 59136, 42)
    assert not pays(4096, 59136, 5000)
    assert shard_large_layers(decoder(), 1000, World(), CPU) == {}


def test_a_divided_decoder_computes_what_the_whole_one_did() -> None:
    torch.manual_seed(1)
    whole = decoder()
    voxels = {1: torch.randn(3, 80), 2: torch.randn(3, 90)}
    expected = whole(voxels)["c"].backbone_BLD
    assert shard_large_layers(whole, 6, World(), CPU)
    torch.testing.assert_close(whole(voxels)["c"].backbone_BLD, expected)


def test_decoders_of_single_targets_become_one_and_joint_ones_do_not(tmp_path: Path) -> None:
    plain = {"hidden_size": 16, "num_blocks": 1, "initial_channels": (8, 16, 16), "prior_depth": 0}
    for heads in ("single", "joint"):
        for spec in SPECS:
            Decoder(DecoderConfig(heads=heads, **plain), {1: 20}, [spec]).save(tmp_path / heads / spec.name)  # type: ignore[arg-type]
    merged = Decoder.merged([tmp_path / "single" / spec.name for spec in SPECS])
    voxels = torch.randn(2, 20)
    for spec in SPECS:
        own = Decoder.load(tmp_path / "single" / spec.name).predict(voxels, 1, [0, 1])[spec.name]
        torch.testing.assert_close(merged.predict(voxels, 1, [0, 1])[spec.name], own)
    with pytest.raises(CheckpointError, match="network of its own"):
        Decoder.merged([tmp_path / "joint" / spec.name for spec in SPECS])
