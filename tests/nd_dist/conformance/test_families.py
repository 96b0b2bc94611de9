"""The families other than the sampler, on small cases that are recomputed here by other means."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from nd_dist.conformance import Row, run_conformance
from nd_dist.conformance.rows import CANNOT_RUN, NOT_CHECKED
from nd_dist.files import write_json
from tests.nd_dist.conformance.own_cases import NAMES, write_weights
from tests.nd_dist.diffusion.support.reference import MEAN, STD
from tests.nd_dist.frozen.toy_folders import CLIP_SIZE, toy_clip_tower

Float64 = npt.NDArray[np.float64]


def rows_of(folder: Path) -> dict[str, Row]:
    return {row.quantity: row for row in run_conformance(folder)}


def held(folder: Path, quantities: set[str]) -> None:
    rows = rows_of(folder)
    assert set(rows) - {NOT_CHECKED} == quantities
    assert all(row.ok for row in rows.values()), [row for row in rows.values() if not row.ok]


def softmax(values: Float64) -> Float64:
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def entropy(logits: Float64, target: Float64) -> float:
    return float(-(target * np.log(softmax(logits))).sum(axis=1).mean())


def test_guidance_cases_hold_and_a_wrong_gradient_fails(tmp_path: Path) -> None:
    write_weights(tmp_path)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (3, 40, 40), dtype=np.uint8)
    targets = {name: rng.normal(size=(1, 160)) for name in NAMES}
    tower = toy_clip_tower(6).double().eval()
    arrays: dict[str, object] = {"img40_u8": picture, **{f"target_{name}": value for name, value in targets.items()}}
    inverse = np.array([1 / np.linalg.norm(value) for value in targets.values()])
    weights = np.array([1.5, 1.2, 1, 1, 1, 1]) * inverse / inverse.sum()
    arrays["layer_weights"] = weights
    for kind, antialias in (("default", True), ("noaa", False)):
        leaf = (torch.from_numpy(picture).double()[None] / 127.5 - 1).requires_grad_(True)
        resized = F.interpolate(((leaf + 1) / 2).clamp(0, 1), CLIP_SIZE, mode="bilinear", antialias=antialias)
        taps: list[torch.Tensor] = []
        handles = [
            layer.mlp.register_forward_hook(lambda _module, _inputs, output, taps=taps: taps.append(output))
            for layer in getattr(tower, "vision_model", tower).encoder.layers
        ]
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        tower(pixel_values=(resized - mean) / std)
        for handle in handles:
            handle.remove()
        errors = [
            (tap.flatten(1) - torch.from_numpy(target)).square().mean()
            for tap, target in zip(taps, targets.values(), strict=True)
        ]
        loss = sum(weight * error for weight, error in zip(weights, errors, strict=True))
        (gradient,) = torch.autograd.grad(loss, leaf)
        arrays[f"img40_{kind}_minus_loss"] = -float(loss)
        arrays[f"img40_{kind}_grad"] = -gradient[0, :, ::2, ::2].numpy()
        arrays[f"img40_{kind}_feat_Linear-12"] = taps[5].flatten(1).detach().numpy()
    (tmp_path / "guidance").mkdir()
    np.savez(tmp_path / "guidance" / "one.npz", **arrays)  # type: ignore[arg-type]
    kinds = {
        f"img40_{kind}_{what}" for kind in ("default", "noaa") for what in ("minus_loss", "grad", "feat_Linear-12")
    }
    held(tmp_path, {*kinds, "layer_weights"})
    arrays["img40_noaa_grad"] = -np.asarray(arrays["img40_noaa_grad"])
    np.savez(tmp_path / "guidance" / "one.npz", **arrays)  # type: ignore[arg-type]
    failed = [row for row in run_conformance(tmp_path) if not row.ok]
    assert [(row.case_file, row.quantity) for row in failed] == [("one.npz", "img40_noaa_grad")]


def test_loss_cases_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    preds, targs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 5, 7)))
    soft, logits = softmax(targs @ targs.T / 0.05), preds @ targs.T / 0.05
    perm, shares = np.array([2, 0, 1, 4, 3]), np.array([0.3, 1.0, 0.7, 0.2, 1.0])
    select = np.array([True, False, True, True, False])
    voxels = rng.normal(size=(5, 1, 6))
    mixed = np.diag(shares)
    mixed[np.arange(5), perm] = 1 - shares
    sharp = preds @ targs.T / 0.006
    arrays = {
        "preds": preds,
        "targs": targs,
        "softclip_t0.05": (entropy(logits, soft) + entropy(logits.T, soft)) / 2,
        "mixco_perm": perm,
        "mixco_betas_in": np.where(select, shares, 0.5),
        "mixco_betas_out": shares,
        "mixco_select": select,
        "mixco_vox_in": voxels,
        "mixco_vox_out": shares[:, None, None] * voxels + (1 - shares)[:, None, None] * voxels[perm],
        "mixco_nce_bi1": (entropy(sharp, mixed) + entropy(sharp.T, mixed.T)) / 2,
        "mixco_nce_bi0": entropy(sharp, mixed),
        "cosine_anneal_11": 0.0075 - 0.0035 / 2 * (1 + np.cos(np.pi * np.linspace(0, 1, 11))),
        "ret_A": preds,
        "ret_B": targs,
        "cos_A_B": (preds @ targs.T).T,
        "prenormed": (preds @ targs.T).T,
        "top2_AB": np.mean([j in np.argsort(-row)[:2] for j, row in enumerate(targs @ preds.T)]),
        "top1_BA": np.mean(np.argmax(preds @ targs.T, axis=1) == np.arange(5)),
    }
    (tmp_path / "losses").mkdir()
    np.savez(tmp_path / "losses" / "mine.npz", **arrays)
    given = {"preds", "targs", "mixco_perm", "mixco_betas_in", "mixco_select", "mixco_vox_in", "ret_A", "ret_B"}
    held(tmp_path, set(arrays) - given)


def test_metric_cases_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    reals, recons = rng.normal(size=(2, 6, 9))
    recons = recons + reals
    r = np.corrcoef(reals, recons)[:6, 6:]
    beaten = [sum(r[i, j] < r[j, j] for i in range(6)) for j in range(6)]
    clip, brain = rng.normal(size=(2, 12, 5))
    brain = brain + clip
    picks = np.stack([rng.permutation(12)[:8] for _ in range(4)])
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (clip, brain)]
    hits = [[np.argmax(unit[0][pick] @ unit[1][pick].T, axis=1) == np.arange(8)] for pick in picks]
    arrays = {
        "feat_real": reals,
        "feat_pred": recons,
        "two_way_counts": np.array(beaten),
        "two_way": np.mean(beaten) / 5,
        "corr_distance_each": 1 - np.diag(r),
        "ret_clip": clip,
        "ret_brain": brain,
        "ret_picks": picks,
        "ret_fwd_each": np.array([np.mean(hit) for hit in hits]),
    }
    (tmp_path / "metrics").mkdir()
    np.savez(tmp_path / "metrics" / "mine.npz", **arrays)
    held(tmp_path, {"two_way_counts", "two_way", "corr_distance_each", "ret_fwd_each"})
    np.savez(tmp_path / "metrics" / "mine.npz", **{**arrays, "two_way": 0.5})
    assert not rows_of(tmp_path)["two_way"].ok


@pytest.fixture
def token_case(tmp_path: Path) -> Path:
    """A token network at sequence length 1: an affine map, recomputed as one."""
    width, tokens, size, voxels = 8, 3, 4, 5
    rng = np.random.default_rng(3)
    weights = {
        "voxelenc.linears.0.weight": rng.normal(size=(width, voxels)),
        "voxelenc.linears.0.bias": rng.normal(size=width),
        "backbone.backbone_linear.weight": rng.normal(size=(tokens * size, width)),
        "backbone.backbone_linear.bias": rng.normal(size=tokens * size),
    }
    for layer in (0, 3, 6):
        weights |= {f"backbone.clip_proj.{layer}.{part}": rng.normal(size=size) for part in ("weight", "bias")}
        weights |= {
            f"backbone.clip_proj.{layer + 2}.weight": rng.normal(size=(size, size)),
            f"backbone.clip_proj.{layer + 2}.bias": rng.normal(size=size),
        }
    shifts = []
    for block in range(2):
        scalars = {
            part: rng.normal() for part in ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.3.weight", "1.3.bias")
        }
        hidden = torch.tensor(scalars["1.0.weight"] * scalars["0.bias"] + scalars["1.0.bias"], dtype=torch.float64)
        shifts.append(scalars["1.3.weight"] * float(F.gelu(hidden)) + scalars["1.3.bias"])
        for part, value in scalars.items():
            shape = (1, 1) if part in ("1.0.weight", "1.3.weight") else (1,)
            weights[f"backbone.mixer_blocks2.{block}.{part}"] = np.full(shape, value)
    x = rng.normal(size=(4, 1, voxels))
    shared = x @ weights["voxelenc.linears.0.weight"].T + weights["voxelenc.linears.0.bias"]
    mixed = (shared + sum(shifts))[:, 0]
    backbone = mixed @ weights["backbone.backbone_linear.weight"].T + weights["backbone.backbone_linear.bias"]
    folder = tmp_path / "models"
    folder.mkdir()
    save_file({name: torch.from_numpy(np.asarray(w)) for name, w in weights.items()}, folder / "tiny.safetensors")
    np.savez(folder / "tiny.npz", x_subj0=x, shared=shared, backbone=backbone.reshape(4, tokens, size))
    settings = {
        "voxel_sizes": [voxels],
        "h": width,
        "seq_len": 1,
        "n_blocks": 2,
        "clip_size": size,
        "n_tokens": tokens,
    }
    write_json(folder / "configs.json", {"tiny": settings})
    return tmp_path


def test_model_cases_hold_at_the_precision_of_stored_weights(token_case: Path) -> None:
    held(token_case, {"shared", "backbone"})


def test_a_model_case_without_weights_or_configuration_fails_by_name(token_case: Path) -> None:
    (token_case / "models" / "tiny.safetensors").rename(token_case / "models" / "other.safetensors")
    assert "tiny.safetensors" in rows_of(token_case)[CANNOT_RUN].note
    write_json(token_case / "models" / "configs.json", {"another": {}})
    assert "no configuration" in rows_of(token_case)[CANNOT_RUN].note


def test_a_further_case_of_a_configuration_may_bring_its_own_weights(token_case: Path) -> None:
    models = token_case / "models"
    for suffix in (".npz", ".safetensors"):
        shutil.copy(models / f"tiny{suffix}", models / f"tiny_seed7{suffix}")
    (models / "tiny.npz").unlink()
    held(token_case, {"shared", "backbone"})
    weights = load_file(models / "tiny_seed7.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, models / "tiny_seed7.safetensors")
    assert not any(row.ok for row in run_conformance(token_case) if row.case_file == "tiny_seed7.npz")


def test_a_model_case_of_unknown_kind_is_reported(token_case: Path) -> None:
    np.savez(token_case / "models" / "tiny2.npz", mystery=np.zeros(3))
    rows = [row for row in run_conformance(token_case) if row.case_file == "tiny2.npz"]
    assert [row.quantity for row in rows] == [NOT_CHECKED]
