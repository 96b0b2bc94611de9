"""The loss functions, pure: tensors in, one number out. Sampling, gathering and weighting are the objective's.

Legend of shape suffixes: N rows of the global batch, D flattened width, P rows of one map.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

LATENT_SCALE = 0.18215
STUDENT_TEMPERATURE = 0.075


def cross_entropy(logits_NN: torch.Tensor, target_NN: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of ``-sum_j target_ij log softmax(logits)_ij``; targets need not sum to one."""
    return -(target_NN * logits_NN.log_softmax(dim=-1)).sum(dim=-1).mean()


def both_ways(logits_NN: torch.Tensor, of_rows_NN: torch.Tensor, of_columns_NN: torch.Tensor) -> torch.Tensor:
    """Return the mean of the cross entropies of rows and of columns, each against its own targets (a row each)."""
    return (cross_entropy(logits_NN, of_rows_NN) + cross_entropy(logits_NN.T, of_columns_NN)) / 2


def mixed_target(weight_N: torch.Tensor, column_N: torch.Tensor, is_released: bool) -> torch.Tensor:
    """Return MixCo's target matrix (N, N): weight on the diagonal, the rest at the partner's column.

    Args:
        weight_N: Share of the row's own voxels in its mix; 1 where it is not mixed.
        column_N: The partner's column.
        is_released: As released, the partner's entry overwrites the diagonal where a row is its own partner (such
            rows then sum to less than one); else it is added.
    """
    rows_N = torch.arange(len(weight_N), device=weight_N.device)
    target_NN = torch.diag(weight_N)
    return target_NN.index_put((rows_N, column_N), 1 - weight_N, accumulate=not is_released)


def bimixco(
    predicted_ND: torch.Tensor, target_ND: torch.Tensor, mixed_NN: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the bidirectional MixCo loss of L2-normalised rows.

    Source: MindEye, equation of BiMixCo; ``mixed_NN`` from ``mixed_target``.
    """
    return both_ways(predicted_ND @ target_ND.T / temperature, mixed_NN, mixed_NN.T)


def soft_clip(predicted_ND: torch.Tensor, target_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the SoftCLIP loss of L2-normalised rows: the targets' own similarities are the soft labels.

    Source: MindEye, SoftCLIP. The released form gives the column direction the same (untransposed) labels.
    """
    return soft_clip_of(predicted_ND @ target_ND.T / temperature, target_ND @ target_ND.T / temperature)


def soft_clip_of(logits_NN: torch.Tensor, likeness_NN: torch.Tensor) -> torch.Tensor:
    """Return the SoftCLIP loss of scores (row: prediction, column: target) and of the targets' own, over tau each."""
    soft_NN = likeness_NN.softmax(dim=-1)
    return both_ways(logits_NN, soft_NN, soft_NN)


def soft_contrastive(
    student_ND: torch.Tensor, teacher_ND: torch.Tensor, augmented_ND: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the contrastive loss of the latent head's student rows against a teacher's, all L2-normalised.

    Args:
        student_ND: Student rows of all samples and positions together.
        teacher_ND: Teacher rows of the images.
        augmented_ND: Teacher rows of the augmented images.
        temperature: 0.075 as published.

    Source: NeuralDiffuser's low-level contrastive term (after MindEye).
    """
    given_student_NN = (teacher_ND @ augmented_ND.T / temperature).softmax(dim=-1)
    given_augmented_NN = (augmented_ND @ teacher_ND.T / temperature).softmax(dim=-1)
    logits_NN = student_ND @ augmented_ND.T / temperature
    return both_ways(logits_NN, given_student_NN, given_augmented_NN)


def soft_contrastive_in_groups(
    student_NPD: torch.Tensor, teacher_NPD: torch.Tensor, augmented_NPD: torch.Tensor, num_samples: int
) -> torch.Tensor:
    """Return the mean over rows of ``soft_contrastive`` within groups of at most ``num_samples`` samples.

    The released code contrasts within a GPU's batch. Samples are dealt to the groups in turn, so that all groups hold
    samples of all subjects; matrices stay small however large the global batch is.
    """
    num = -(-len(student_NPD) // num_samples)
    parts = []
    for group in (slice(first, None, num) for first in range(num)):
        student_ND, teacher_ND, augmented_ND = (
            rows_NPD[group].flatten(0, 1) for rows_NPD in (student_NPD, teacher_NPD, augmented_NPD)
        )
        share = len(student_NPD[group]) / len(student_NPD)
        parts.append(share * soft_contrastive(student_ND, teacher_ND, augmented_ND, STUDENT_TEMPERATURE))
    return torch.stack(parts).sum()


def prior_error(predicted_BLD: torch.Tensor, target_BLD: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the sum of squared errors times ``scale``: with 1 / (number of values) the mean."""
    return F.mse_loss(predicted_BLD, target_BLD, reduction="sum") * scale


def latent_error(predicted_BCHW: torch.Tensor, target_BCHW: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the sum of absolute errors of latents, in units of the unscaled VAE latent, times ``scale``."""
    return F.l1_loss(predicted_BCHW, target_BCHW, reduction="sum") * (scale / LATENT_SCALE)


def top1(scores_NN: torch.Tensor) -> torch.Tensor:
    """Return the share of rows whose highest score is on the diagonal."""
    return (scores_NN.argmax(dim=1) == torch.arange(len(scores_NN), device=scores_NN.device)).float().mean()
