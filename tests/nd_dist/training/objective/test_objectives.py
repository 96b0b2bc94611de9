from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import Batch, TargetSpec, role_of
from nd_dist.training.objective import losses
from nd_dist.training.objective.objectives import TOTAL, Objective, StepInputs, unit_rows
from nd_dist.training.ranks import GlobalRows
from nd_dist.world import World
from tests.nd_dist.training.virtual import VirtualRanks

SHAPES: dict[str, tuple[int, ...]] = {"c": (3, 8), "z": (4, 8, 8), "g02": (4, 6)}
SPECS = tuple(TargetSpec(name, role_of(name), shape) for name, shape in SHAPES.items())
VOXELS = {1: 11, 4: 9}
COUNT = 4
TOTAL_STEPS = 30
MIXCO_STEP, SOFTCLIP_STEP = 2, 20


def objective(training: TrainingConfig | None = None, student: bool = False, **decoder: object) -> Objective:
    torch.manual_seed(0)
    config = DecoderConfig(
        hidden_size=12, num_blocks=2, initial_channels=(8, 8, 8), prior_depth=1, prior_dim_head=8
    ).model_copy(update=decoder)
    network = Decoder(config, VOXELS, SPECS, student)
    return Objective(network, training or TrainingConfig(), TOTAL_STEPS, 5, GlobalRows(2 * COUNT))


def batch(rank: int = 0, size: int = 1, micro_step: int = 3) -> Batch:
    """A rank's rows of one global batch, as a stream deals them."""
    generator = torch.Generator().manual_seed(1)
    whole = {s: torch.randn(COUNT, n, generator=generator) for s, n in VOXELS.items()}
    voxels = {s: rows[(rank - i * COUNT) % size :: size] for i, (s, rows) in enumerate(whole.items())}
    targets = {name: torch.randn(2 * COUNT, *shape, generator=generator)[rank::size] for name, shape in SHAPES.items()}
    ids = np.arange(rank, 2 * COUNT, size)
    return Batch(micro_step, voxels, targets, ids // COUNT, ids, ids, ids, ids, ids)


def inputs(model: Objective, step: int, micro_step: int = 3) -> StepInputs:
    return model.prepare(batch(micro_step=micro_step), step, torch.device("cpu"), torch.float32)


def made(model: Objective, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its terms at an optimizer step."""
    found: tuple[torch.Tensor, dict[str, torch.Tensor]] = model(inputs(model, step), step)
    return found


@pytest.mark.parametrize("step", [MIXCO_STEP, SOFTCLIP_STEP])
@pytest.mark.parametrize("size", [2, 3, 4, 8, 11])
def test_loss_and_gradients_do_not_depend_on_the_number_of_ranks(step: int, size: int) -> None:
    whole = objective()
    loss, terms = made(whole, step)
    loss.backward()
    ranks = VirtualRanks(size)
    parts = [copy.deepcopy(whole) for _ in range(size)]

    def act(rank: int) -> dict[str, float]:
        parts[rank]._rows = GlobalRows(2 * COUNT, World(rank, size), ranks.gather_of(rank))
        parts[rank].zero_grad()
        prepared = parts[rank].prepare(batch(rank, size), step, torch.device("cpu"), torch.float32)
        loss, terms = parts[rank](prepared, step)
        loss.backward()
        return {name: float(value) for name, value in terms.items()}

    found = ranks.run(act)
    for name, value in terms.items():
        assert sum(part[name] for part in found) / size == pytest.approx(float(value), rel=2e-5, abs=1e-6)
    for name, parameter in whole.named_parameters():
        mean = sum(dict(part.named_parameters())[name].grad for part in parts) / size
        torch.testing.assert_close(mean, parameter.grad, rtol=2e-3, atol=2e-4, msg=name)


def test_the_total_is_the_published_weighted_sum_of_its_terms() -> None:
    loss, terms = made(objective(), SOFTCLIP_STEP)
    tokens = sum(30 * terms[f"{name}/prior"] + terms[f"{name}/contrastive"] for name in ("c", "g02"))
    torch.testing.assert_close(loss, tokens + terms["z/l1"])
    torch.testing.assert_close(terms[TOTAL], loss.detach())


def test_weights_of_the_recipe_are_applied_and_zero_turns_a_term_off() -> None:
    training = TrainingConfig(prior_weight=2.0, contrastive_weight=0.0)
    loss, terms = made(objective(training), SOFTCLIP_STEP)
    torch.testing.assert_close(loss, 2 * (terms["c/prior"] + terms["g02/prior"]) + terms["z/l1"])


def test_without_a_prior_the_backbone_is_trained_with_its_loss() -> None:
    model = objective(prior_depth=0, backbone_dropout=0.0)
    _, terms = made(model, SOFTCLIP_STEP)
    backbone = model.decoder(batch().voxels)["c"].backbone_BLD
    torch.testing.assert_close(terms["c/prior"], F.mse_loss(backbone, batch().targets["c"]))


def test_mixing_changes_the_token_heads_voxels_only() -> None:
    model = objective(initial_voxel_dropout=0.0, initial_dropout=0.0)
    _, mixco = made(model, MIXCO_STEP)
    _, softclip = made(model, SOFTCLIP_STEP)
    torch.testing.assert_close(mixco["z/l1"], softclip["z/l1"])
    assert not torch.allclose(mixco["c/prior"], softclip["c/prior"])


def test_the_softclip_term_is_the_loss_of_the_contrastive_head() -> None:
    model = objective(backbone_dropout=0.0)
    _, terms = made(model, TOTAL_STEPS - 1)
    predicted = unit_rows(model.decoder(batch().voxels)["c"].contrastive_BLD)
    expected = losses.soft_clip(predicted, unit_rows(batch().targets["c"]), 0.0075)
    torch.testing.assert_close(terms["c/contrastive"], expected.detach())


def test_released_quirks_change_the_mixco_term_only() -> None:
    _, fixed = made(objective(), MIXCO_STEP)
    _, released = made(objective(TrainingConfig(quirks="official")), MIXCO_STEP)
    torch.testing.assert_close(fixed["c/prior"], released["c/prior"])
    assert not torch.allclose(fixed["c/contrastive"], released["c/contrastive"])


def test_a_teacher_adds_the_students_contrastive_term_at_a_tenth() -> None:
    model = objective(student=True)
    _, without = made(model, SOFTCLIP_STEP)
    assert "z/contrastive" not in without
    rows = torch.randn(2, 2 * COUNT, 4, 512, generator=torch.Generator().manual_seed(2))
    model._teacher = lambda _: (rows[0], rows[1])
    loss, terms = made(model, SOFTCLIP_STEP)
    tokens = sum(30 * terms[f"{name}/prior"] + terms[f"{name}/contrastive"] for name in ("c", "g02"))
    torch.testing.assert_close(loss.detach(), tokens + terms["z/l1"] + 0.1 * terms["z/contrastive"])


def test_the_same_step_draws_the_same_numbers_twice_and_another_step_others() -> None:
    model = objective()
    now, later = (inputs(model, SOFTCLIP_STEP, micro_step) for micro_step in (3, 4))
    first, again, other = (float(model(b, SOFTCLIP_STEP)[1][TOTAL]) for b in (now, now, later))
    assert first == again
    assert first != other


def test_every_parameter_is_trained_over_both_phases() -> None:
    model = objective()
    for module in model.modules():
        if hasattr(module, "norm_bias"):
            torch.nn.init.constant_(module.norm_bias, 0.3)
    for micro_step in range(6):  # several draws, so that each null embedding is used
        step = MIXCO_STEP if micro_step % 2 else SOFTCLIP_STEP
        model(inputs(model, step, micro_step), step)[0].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []


def test_a_stream_that_deals_other_rows_than_the_loss_expects_is_noticed() -> None:
    model = objective()
    with pytest.raises(AssertionError, match="other rows"):
        model.prepare(batch(1, 2), SOFTCLIP_STEP, torch.device("cpu"), torch.float32)
