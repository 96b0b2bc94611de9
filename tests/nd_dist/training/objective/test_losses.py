from __future__ import annotations

import math

import pytest
import torch

from nd_dist.training.objective import losses


def unit_rows(seed: int, count: int = 7, width: int = 5) -> torch.Tensor:
    rows = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def cross_entropy(logits: list[list[float]], target: list[list[float]]) -> float:
    rows = [
        -sum(q * math.log(p) for q, p in zip(row, softmax(line), strict=True))
        for line, row in zip(logits, target, strict=True)
    ]
    return sum(rows) / len(rows)


def transposed(matrix: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*matrix, strict=True)]


def test_softclip_equals_its_sum_written_out() -> None:
    p, t, tau = unit_rows(0), unit_rows(1), 0.125
    logits = (p @ t.T / tau).tolist()
    soft = [softmax(row) for row in (t @ t.T / tau).tolist()]
    expected = (cross_entropy(logits, soft) + cross_entropy(transposed(logits), soft)) / 2
    assert float(losses.soft_clip(p, t, tau)) == pytest.approx(expected, rel=1e-12)


def test_bimixco_equals_its_sum_written_out() -> None:
    p, t, tau = unit_rows(0), unit_rows(1), 0.1
    weight = torch.tensor([0.3, 1.0, 0.8, 0.5, 1.0, 0.9, 0.2], dtype=torch.float64)
    column = torch.tensor([4, 0, 1, 2, 3, 6, 5])
    target = [[0.0] * 7 for _ in range(7)]
    for i in range(7):
        target[i][i] = float(weight[i])
        target[i][int(column[i])] += 1 - float(weight[i])
    logits = (p @ t.T / tau).tolist()
    expected = (cross_entropy(logits, target) + cross_entropy(transposed(logits), transposed(target))) / 2
    mixed = losses.mixed_target(weight, column, is_released=False)
    assert float(losses.bimixco(p, t, mixed, tau)) == pytest.approx(expected, rel=1e-12)


def test_a_row_that_is_its_own_partner_keeps_its_whole_target_unless_as_released() -> None:
    weight, column = torch.tensor([0.3, 1.0, 0.6]), torch.tensor([0, 2, 1])
    fixed = losses.mixed_target(weight, column, is_released=False)
    released = losses.mixed_target(weight, column, is_released=True)
    torch.testing.assert_close(fixed.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(released[0], torch.tensor([0.7, 0.0, 0.0]))
    torch.testing.assert_close(fixed[1:], released[1:])


def test_the_latent_contrastive_loss_equals_its_sum_written_out() -> None:
    s, t, a, tau = unit_rows(0), unit_rows(1), unit_rows(2), 0.075
    logits = (s @ a.T / tau).tolist()
    one = [softmax(row) for row in (t @ a.T / tau).tolist()]
    two = [softmax(row) for row in (a @ t.T / tau).tolist()]
    expected = (cross_entropy(logits, one) + cross_entropy(transposed(logits), two)) / 2
    assert float(losses.soft_contrastive(s, t, a, tau)) == pytest.approx(expected, rel=1e-12)


def test_loss_gradients_agree_with_finite_differences() -> None:
    p, t, a = (unit_rows(seed, 4, 3) for seed in range(3))
    mixed = losses.mixed_target(torch.tensor([0.3, 1.0, 0.6, 0.9]).double(), torch.tensor([1, 0, 3, 2]), False)
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.soft_clip(x, t, 0.5), (p,))
    assert torch.autograd.gradcheck(lambda x: losses.bimixco(x, t, mixed, 0.5), (p,))
    assert torch.autograd.gradcheck(lambda x: losses.soft_contrastive(x, t, a, 0.5), (p,))


def test_latent_l1_is_in_units_of_the_unscaled_latent() -> None:
    found = losses.latent_error(torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 0.18215), 1 / 512)
    assert float(found) == pytest.approx(1)


def test_contrast_in_groups_is_the_mean_over_rows_of_groups_that_hold_every_nth_sample() -> None:
    student, teacher, augmented = (unit_rows(seed, 7 * 2, 5).view(7, 2, 5) for seed in range(3))
    everyone = losses.soft_contrastive_in_groups(student, teacher, augmented, 7)
    flat = [rows.flatten(0, 1) for rows in (student, teacher, augmented)]
    torch.testing.assert_close(everyone, losses.soft_contrastive(*flat, losses.STUDENT_TEMPERATURE))
    expected = sum(
        len(picked) / 7 * losses.soft_contrastive(
            *(rows[picked].flatten(0, 1) for rows in (student, teacher, augmented)), losses.STUDENT_TEMPERATURE
        )
        for picked in ([0, 3, 6], [1, 4], [2, 5])
    )  # fmt: skip
    torch.testing.assert_close(losses.soft_contrastive_in_groups(student, teacher, augmented, 3), expected)


def test_top1_counts_rows_whose_best_score_is_their_own() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.5, 0.0], [0.0, 0.0, 5.0]])
    assert float(losses.top1(scores)) == pytest.approx(2 / 3)
    assert float(losses.top1(scores.T)) == pytest.approx(1.0)
