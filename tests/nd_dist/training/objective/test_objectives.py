from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from nd_dist.config import DecoderConfig, TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.training.objective import losses
from nd_dist.training.objective.objectives import TOTAL, Objective, StepInputs, unit_rows
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
    return Objective(
        Decoder(config, VOXELS, SPECS, student), training or TrainingConfig(), TOTAL_STEPS, 5, teacher=None
    )


def inputs(place: torch.Tensor | None = None) -> StepInputs:
    place = torch.arange(COUNT) if place is None else place
    generator = torch.Generator().manual_seed(1)
    voxels = {s: torch.randn(COUNT, n, generator=generator)[place] for s, n in VOXELS.items()}
    targets = {
        name: torch.randn(2 * COUNT, *shape, generator=generator)[torch.cat([place, COUNT + place])]
        for name, shape in SHAPES.items()
    }
    return StepInputs(3, voxels, targets, torch.cat([place, COUNT + place]))


@pytest.mark.parametrize("step", [MIXCO_STEP, SOFTCLIP_STEP])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradients_do_not_depend_on_the_number_of_ranks(step: int, size: int) -> None:
    whole = objective()
    loss, terms = whole(inputs(), step)
    loss.backward()
    ranks = VirtualRanks(size)
    parts = [copy.deepcopy(whole) for _ in range(size)]

    def act(rank: int) -> dict[str, float]:
        parts[rank]._gather = ranks.gather_of(rank)
        parts[rank].zero_grad()
        loss, terms = parts[rank](inputs(torch.arange(rank, COUNT, size)), step)
        loss.backward()
        return {name: float(value) for name, value in terms.items()}

    found = ranks.run(act)
    for name, value in terms.items():
        assert sum(part[name] for part in found) / size == pytest.approx(float(value), rel=2e-5, abs=1e-6)
    for name, parameter in whole.named_parameters():
        mean = sum(dict(part.named_parameters())[name].grad for part in parts) / size
        torch.testing.assert_close(mean, parameter.grad, rtol=2e-3, atol=2e-4, msg=name)


def test_the_total_is_the_published_weighted_sum_of_its_terms() -> None:
    loss, terms = objective()(inputs(), SOFTCLIP_STEP)
    tokens = sum(30 * terms[f"{name}/prior"] + terms[f"{name}/contrastive"] for name in ("c", "g02"))
    torch.testing.assert_close(loss, tokens + terms["z/l1"])
    torch.testing.assert_close(terms[TOTAL], loss.detach())


def test_weights_of_the_recipe_are_applied_and_zero_turns_a_term_off() -> None:
    training = TrainingConfig(prior_weight=2.0, contrastive_weight=0.0)
    loss, terms = objective(training)(inputs(), SOFTCLIP_STEP)
    torch.testing.assert_close(loss, 2 * (terms["c/prior"] + terms["g02/prior"]) + terms["z/l1"])


def test_without_a_prior_the_backbone_is_trained_with_its_loss() -> None:
    model = objective(prior_depth=0, backbone_dropout=0.0)
    _, terms = model(inputs(), SOFTCLIP_STEP)
    backbone = model.decoder(inputs().voxels)["c"].backbone_BLD
    torch.testing.assert_close(terms["c/prior"], F.mse_loss(backbone, inputs().targets["c"]))


def test_mixing_changes_the_token_heads_voxels_only() -> None:
    model = objective(initial_voxel_dropout=0.0, initial_dropout=0.0)
    _, mixco = model(inputs(), MIXCO_STEP)
    _, softclip = model(inputs(), SOFTCLIP_STEP)
    torch.testing.assert_close(mixco["z/l1"], softclip["z/l1"])
    assert not torch.allclose(mixco["c/prior"], softclip["c/prior"])


def test_the_softclip_term_is_the_loss_of_the_contrastive_head() -> None:
    model = objective(backbone_dropout=0.0)
    _, terms = model(inputs(), TOTAL_STEPS - 1)
    predicted = unit_rows(model.decoder(inputs().voxels)["c"].contrastive_BLD)
    expected = losses.soft_clip(predicted, unit_rows(inputs().targets["c"]), 0.0075)
    torch.testing.assert_close(terms["c/contrastive"], expected.detach())


def test_released_quirks_change_the_mixco_term_only() -> None:
    _, fixed = objective()(inputs(), MIXCO_STEP)
    _, released = objective(TrainingConfig(quirks="official"))(inputs(), MIXCO_STEP)
    torch.testing.assert_close(fixed["c/prior"], released["c/prior"])
    assert not torch.allclose(fixed["c/contrastive"], released["c/contrastive"])


def test_a_teacher_adds_the_students_contrastive_term_at_a_tenth() -> None:
    model = objective(student=True)
    _, without = model(inputs(), SOFTCLIP_STEP)
    assert "z/contrastive" not in without
    rows = torch.randn(2, 2 * COUNT, 4, 512, generator=torch.Generator().manual_seed(2))
    model._teacher = lambda _: (rows[0], rows[1])
    loss, terms = model(inputs(), SOFTCLIP_STEP)
    tokens = sum(30 * terms[f"{name}/prior"] + terms[f"{name}/contrastive"] for name in ("c", "g02"))
    torch.testing.assert_close(loss.detach(), tokens + terms["z/l1"] + 0.1 * terms["z/contrastive"])


def test_the_same_step_draws_the_same_numbers_twice_and_another_step_others() -> None:
    model = objective()
    batch = inputs()
    later = StepInputs(4, batch.voxels, batch.targets, batch.sample_id_B)
    first, again, other = (float(model(b, SOFTCLIP_STEP)[1][TOTAL]) for b in (batch, batch, later))
    assert first == again
    assert first != other


def test_every_parameter_is_trained_over_both_phases() -> None:
    model = objective()
    for module in model.modules():
        if hasattr(module, "norm_bias"):
            torch.nn.init.constant_(module.norm_bias, 0.3)
    for micro_step in range(6):  # several draws, so that each null embedding is used
        batch = inputs()
        step = MIXCO_STEP if micro_step % 2 else SOFTCLIP_STEP
        model(StepInputs(micro_step, batch.voxels, batch.targets, batch.sample_id_B), step)[0].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []
