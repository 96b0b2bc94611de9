"""Cases of the training losses and their gradients, MixCo's mixing, the schedules, and similarity matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betainc

from nd_dist.config import TrainingConfig
from nd_dist.conformance.rows import DOUBLE, SINGLE, Case, Row, compare, isolated
from nd_dist.metrics.identification import correlation_matrix
from nd_dist.metrics.retrieval import cosine_matrix, image_hits
from nd_dist.training.objective import losses
from nd_dist.training.objective.mixco import BETA, mix_of, mixed
from nd_dist.training.schedule import MIXCO_TEMPERATURE, OneCycle, softclip_temperature

Loss = Callable[[torch.Tensor], torch.Tensor]


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of every ``.npz`` of the folder."""
    for path in sorted(folder.glob("*.npz")):
        yield from isolated(path.name, _check_case(path))


def _check_case(path: Path) -> Iterator[Row]:
    case = Case(path)
    for part in (_check_contrastive, _check_mixing, _check_student, _check_schedules, _check_similarities):
        yield from part(case)
    yield from case.left_over()


def _check_loss(case: Case, name: str, rows_ND: torch.Tensor, loss: Loss, gradient: str = "") -> Iterator[Row]:
    """Yield the value of a loss and its gradient in ``rows_ND``."""
    if name not in case:
        return
    leaf = rows_ND.clone().requires_grad_(True)
    value = loss(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    yield compare(case.file, name, value, case[name], DOUBLE)
    if (gradient or f"{name}_gradpreds") in case:
        stored = gradient or f"{name}_gradpreds"
        yield compare(case.file, stored, slope, case[stored], DOUBLE)


def _check_contrastive(case: Case) -> Iterator[Row]:
    if not case.has("preds", "targs"):
        return
    preds, targs = case.tensor("preds"), case.tensor("targs")
    for name in case.names:
        if match := re.fullmatch(r"softclip_t([\d.]+)", name):
            temperature = float(match.group(1))
            yield from _check_loss(
                case, name, preds, partial(losses.soft_clip, target_ND=targs, temperature=temperature)
            )
    unmixed = torch.eye(len(preds), dtype=preds.dtype)
    yield from _check_loss(case, "infonce_bi", preds, lambda p: losses.bimixco(p, targs, unmixed, MIXCO_TEMPERATURE))
    if case.has("mixco_perm", "mixco_betas_out"):
        mixed = losses.mixed_target(case.tensor("mixco_betas_out"), case.tensor("mixco_perm"), is_released=True)
        yield from _check_loss(
            case, "mixco_nce_bi1", preds, lambda p: losses.bimixco(p, targs, mixed, MIXCO_TEMPERATURE)
        )
        yield from _check_loss(
            case,
            "mixco_nce_bi0",
            preds,
            lambda p: losses.cross_entropy(p @ targs.T / MIXCO_TEMPERATURE, mixed),
        )
    if case.has("mixco_2subj_perm", "mixco_2subj_betas"):
        case.mark_read("mixco_2subj_select")  # the stored shares are 1 where it is false
        betas, perm = case.tensor("mixco_2subj_betas"), case.tensor("mixco_2subj_perm")
        both = losses.mixed_target(betas, perm, is_released=True)
        yield from _check_loss(
            case,
            "mixco_2subj_loss",
            preds[: len(perm)],
            lambda p: losses.bimixco(p, targs[: len(perm)], both, MIXCO_TEMPERATURE),
            "mixco_2subj_gradpreds",
        )


def _check_mixing(case: Case) -> Iterator[Row]:
    """Yield what is mixed of recorded partners, shares and choices, given as random numbers that stand for them."""
    for prefix, betas in (("mixco_", "mixco_betas_in"), ("mixco_rng_", "mixco_rng_betas")):
        if not case.has(*(f"{prefix}{name}" for name in ("vox_in", "vox_out", "perm", "select")), betas):
            continue
        voxels, partner_N = case.tensor(f"{prefix}vox_in", torch.float64).squeeze(1), case[f"{prefix}perm"]
        place_N = np.empty(len(partner_N))
        place_N[partner_N] = np.arange(len(partner_N)) / len(partner_N)
        share_N = betainc(BETA, BETA, np.asarray(case[betas], dtype=np.float64))
        select_N = np.where(np.asarray(case[f"{prefix}select"]), 0.25, 0.75)
        mix = mix_of(np.stack([place_N, share_N, select_N]), [len(partner_N)], is_released=True)
        yield compare(case.file, f"{prefix}vox_out", mixed(voxels, mix), case[f"{prefix}vox_out"].squeeze(1), DOUBLE)
        shares = f"{prefix}betas_out" if f"{prefix}betas_out" in case else betas
        yield compare(case.file, shares, mix.weight_N, case[shares], DOUBLE)


def _check_student(case: Case) -> Iterator[Row]:
    yield from _check_latent_error(case)
    if not case.has("cont_student", "cont_teacher", "cont_teacher_aug"):
        return
    student, teacher, augmented = (case.tensor(name) for name in ("cont_student", "cont_teacher", "cont_teacher_aug"))
    for name in case.names:
        if match := re.fullmatch(r"cont_t0(\d+)", name):
            temperature = float(f"0.{match.group(1)}")
            gradient = "cont_gradstudent" if temperature == losses.STUDENT_TEMPERATURE else ""
            yield from _check_loss(
                case,
                name,
                student,
                partial(losses.soft_contrastive, teacher_ND=teacher, augmented_ND=augmented, temperature=temperature),
                gradient,
            )


def _check_latent_error(case: Case) -> Iterator[Row]:
    if case.has("z_l1", "z_pred", "z_target"):
        # the stored error is that of scaled latents
        predicted, target = case.tensor("z_pred"), case.tensor("z_target")
        ours = losses.latent_error(predicted, target, losses.LATENT_SCALE / target.numel())
        yield compare(case.file, "z_l1", ours, case["z_l1"], DOUBLE)


def _check_schedules(case: Case) -> Iterator[Row]:
    for name in case.names:
        if name.startswith("cosine_anneal_"):
            last = len(case[name]) - 1
            ours = [softclip_temperature(epoch / last) for epoch in range(last + 1)]
            yield compare(case.file, name, ours, case[name], DOUBLE)
    if case.has("onecycle_lr", "onecycle_total_steps", "onecycle_step"):
        training = TrainingConfig()
        total = int(case["onecycle_total_steps"])
        cycle = OneCycle(total, training.learning_rate, training.warmup_fraction, training.cycle_momentum)
        rates = [cycle.learning_rate(int(step)) for step in case["onecycle_step"]]
        yield compare(case.file, "onecycle_lr", rates, case["onecycle_lr"], DOUBLE)


def _check_similarities(case: Case) -> Iterator[Row]:
    """Yield similarity matrices and top-k; the released cosine matrix has its second argument's rows as rows."""
    if not case.has("ret_A", "ret_B"):
        return
    a, b = (case[name].reshape(len(case[name]), -1).astype(np.float64) for name in ("ret_A", "ret_B"))
    cosines = cosine_matrix(a, b)
    ours = {"cos_A_B": cosines.T, "pearson": correlation_matrix(a, b), "prenormed": b @ a.T}
    for name in case.names:
        if match := re.fullmatch(r"top(\d+)_(AB|BA)", name):
            is_ab = match.group(2) == "AB"
            ours[name] = _top_share(cosines.T if is_ab else cosines, int(match.group(1)))
    for quantity in [name for name in ours if name in case]:
        yield compare(case.file, quantity, ours[quantity], case[quantity], SINGLE)


def _top_share(similarities_NN: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float64]:
    """Return the share of rows whose own column is among their k largest (k = 1: the product's own retrieval)."""
    if k == 1:
        return np.asarray(image_hits(similarities_NN).mean())
    nearest = np.argsort(-similarities_NN, axis=1)[:, :k]
    return np.asarray((nearest == np.arange(len(nearest))[:, None]).any(axis=1).mean())
