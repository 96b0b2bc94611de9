from __future__ import annotations

import torch

from nd_dist.config import DecoderConfig
from nd_dist.models.backbone import Mixer
from nd_dist.models.draws import Draws
from nd_dist.models.heads import TokenHead
from nd_dist.models.released import token_head_state
from nd_dist.schema import TargetSpec
from tests.nd_dist.models import reference

HIDDEN, BLOCKS, TOKENS = 10, 3, (4, 6)
CONFIG = DecoderConfig(hidden_size=HIDDEN, num_blocks=BLOCKS, prior_depth=0)
SPEC = TargetSpec("c", "semantic", TOKENS)


def head_from(weights: reference.State, seq_len: int) -> TokenHead:
    head = TokenHead(CONFIG, SPEC, seq_len).double()
    head.load_state_dict(token_head_state(weights, seq_len))
    return head


def test_the_affine_shortcut_equals_the_full_published_mixer_at_sequence_length_one() -> None:
    weights = reference.random_state(reference.backbone_shapes(HIDDEN, 1, BLOCKS, TOKENS))
    x = torch.randn(5, 1, HIDDEN, dtype=torch.float64)
    backbone, contrastive = reference.published_head(x, weights, BLOCKS, TOKENS)
    output = head_from(weights, 1)(x)
    torch.testing.assert_close(output.backbone_BLD, backbone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.contrastive_BLD, contrastive, rtol=1e-12, atol=1e-12)


def test_the_published_mixer_is_computed_in_full_at_sequence_length_two() -> None:
    weights = reference.random_state(reference.backbone_shapes(HIDDEN, 2, BLOCKS, TOKENS))
    x = torch.randn(5, 2, HIDDEN, dtype=torch.float64)
    backbone, contrastive = reference.published_head(x, weights, BLOCKS, TOKENS)
    output = head_from(weights, 2)(x)
    torch.testing.assert_close(output.backbone_BLD, backbone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.contrastive_BLD, contrastive, rtol=1e-12, atol=1e-12)


def repaired_pair(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights = reference.random_state(reference.backbone_shapes(HIDDEN, seq_len, BLOCKS, TOKENS))
    mixer = Mixer(HIDDEN, BLOCKS, "single_residual", 0.0, "c", seq_len).double()
    # the full renaming keeps the hidden blocks, which the repaired form uses at any sequence length
    full, short = token_head_state(weights, 2), token_head_state(weights, seq_len)
    named = {name.removeprefix("backbone.mixer."): value for name, value in {**full, **short}.items()}
    mixer.load_state_dict({name: named[name] for name in mixer.state_dict()})
    x = torch.randn(5, seq_len, HIDDEN, dtype=torch.float64)
    return mixer(x), reference.repaired_mixer(x, weights, BLOCKS)


def test_the_repaired_mixer_has_one_residual_chain_at_both_sequence_lengths() -> None:
    for seq_len in (1, 2):
        found, expected = repaired_pair(seq_len)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_official_mixer_is_affine_and_the_repaired_one_is_not() -> None:
    a, b = torch.randn(2, 1, 1, HIDDEN, dtype=torch.float64)
    for form, is_affine in (("official", True), ("single_residual", False)):
        mixer = Mixer(HIDDEN, BLOCKS, form, 0.0, "c").double()  # type: ignore[arg-type]
        bend = (mixer(a) + mixer(b)) / 2 - mixer((a + b) / 2)
        assert (bend.abs().max() < 1e-12) == is_affine


def test_every_stored_parameter_of_a_head_gets_a_gradient_in_training() -> None:
    for mixer in ("official", "single_residual"):
        config = CONFIG.model_copy(update={"mixer": mixer})
        head = TokenHead(config, SPEC)
        with torch.no_grad():
            head.backbone.mixer.token_shifts.norm_bias.add_(0.3)  # zero at the start, which hides in_weight's gradient
        draws = Draws(0, 0, torch.arange(6))
        head(torch.randn(6, 1, HIDDEN), draws).contrastive_BLD.square().sum().backward()
        dead = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert dead == []


def test_the_full_size_backbones_store_the_published_parameters_less_the_dead_ones() -> None:
    for hidden, name, num_tokens, published in (
        (1024, "c", 77, 70_795_800),
        (4096, "c", 77, 378_339_864),
        (1024, "g02", 50, 49_541_400),
        (4096, "g02", 50, 293_384_472),
    ):
        dead = 4 * (2 * hidden + 2 * (hidden * hidden + hidden)) + 4  # all M1 blocks, and M2's norm weights
        with torch.device("meta"):
            head = TokenHead(DecoderConfig(hidden_size=hidden), TargetSpec(name, "semantic", (num_tokens, 768)))
        stored = sum(p.numel() for part in (head.backbone, head.contrastive) for p in part.parameters())
        assert stored + dead == published


def test_dropout_keeps_the_mean_shift_and_differs_per_channel() -> None:
    mixer = Mixer(HIDDEN, BLOCKS, "official", 0.15, "c")
    x = torch.zeros(4000, 1, HIDDEN)
    dropped = mixer(x, Draws(0, 0, torch.arange(4000)))
    assert dropped.std(dim=2).max() > 0
    torch.testing.assert_close(dropped.mean(), mixer(x).mean(), atol=0.02, rtol=0)
