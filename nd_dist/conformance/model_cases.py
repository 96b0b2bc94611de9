"""Cases of the decoders: token networks (c, g), the latent network (z) and the diffusion prior, in evaluation mode.

``models/configs.json`` says how each was built; weights are safetensors, or follow from a formula there. The kind of a
case shows in its arrays; its configuration is the entry that its file is named after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from nd_dist.config import DecoderConfig
from nd_dist.conformance.rows import DOUBLE, SINGLE, Case, Row, compare, isolated, not_checked
from nd_dist.errors import CheckpointError, DataError
from nd_dist.files import read_json
from nd_dist.models.heads import LatentHead, TokenHead
from nd_dist.models.prior import DiffusionPrior
from nd_dist.models.prior_network import PriorNetwork
from nd_dist.models.released import (
    State,
    latent_head_state,
    prior_state,
    token_head_state,
    voxel_encoder_state,
    without_prefix,
)
from nd_dist.models.voxels import NormalizedEncoder, RidgeEncoder
from nd_dist.schema import GUIDANCE, INITIAL, TargetSpec

LATENT = 5e-4
"""The latent network on formula weights: a float32 run is up to 6e-5 from a float64 run, so two may be twice that."""

Settings = Mapping[str, Any]  # Any: constructor arguments of several networks


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of every ``.npz`` of the folder."""
    for path in sorted(folder.glob("*.npz")):
        yield from isolated(path.name, _check_case(path))


def _check_case(path: Path) -> Iterator[Row]:
    case, configs = Case(path), read_json(path.parent / "configs.json")
    kind = next((checker for marker, checker in KINDS.items() if marker in case), None)
    if kind is None:
        yield not_checked(path.name, "holds none of the arrays that tell its kind")
        return
    key = _entry_of(path, configs)
    own = path.with_suffix(".safetensors")
    with torch.no_grad():
        yield from kind(case, configs[key], own if own.is_file() else path.with_name(f"{key}.safetensors"))
    yield from case.left_over()


def _entry_of(path: Path, configs: Mapping[str, Settings]) -> str:
    """Return the configuration's key: the file's name, or the longest key that it begins with."""
    if keys := [key for key in configs if path.stem.startswith(key)]:
        return max(keys, key=len)
    raise DataError("A model case has no configuration.", where=str(path), expected=f"one of {sorted(configs)}")


def _check_token_network(case: Case, settings: Settings, weights_path: Path) -> Iterator[Row]:
    released = _read(weights_path)
    seq_len = int(settings.get("seq_len", 1))
    config = DecoderConfig(hidden_size=settings["h"], num_blocks=settings["n_blocks"], prior_depth=0)
    spec = TargetSpec(GUIDANCE[0], "guidance", (settings["n_tokens"], settings["clip_size"]))
    head = TokenHead(config, spec, seq_len)
    _load(head, token_head_state(without_prefix(released, "backbone.") or released, seq_len), weights_path)
    if "x" in case:
        shared_BSH = case.tensor("x", torch.float64)
    else:
        sizes = dict(enumerate(settings["voxel_sizes"]))
        encoder = RidgeEncoder(sizes, settings["h"])
        _load(encoder, voxel_encoder_state(without_prefix(released, "voxelenc."), tuple(sizes)), weights_path)
        shared_BSH = encoder(_voxels(case, sizes, torch.float64))[:, None]
        if "shared" in case:
            yield compare(case.file, "shared", shared_BSH, case["shared"], DOUBLE)
    output = head(shared_BSH)
    yield compare(case.file, "backbone", output.backbone_BLD, case["backbone"], DOUBLE)
    if "clip_voxels" in case:
        yield compare(case.file, "clip_voxels", output.contrastive_BLD, case["clip_voxels"], DOUBLE)


def _voxels(case: Case, sizes: Mapping[int, int], dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Return the voxels of the subjects that the case holds: ``x_subj0`` and so on, or ``x`` of the only one."""
    names = {subject: f"x_subj{subject}" for subject in sizes if f"x_subj{subject}" in case} or {0: "x"}
    return {subject: case.tensor(name, dtype).squeeze(1) for subject, name in names.items()}


def _check_latent_network(case: Case, settings: Settings, weights_path: Path) -> Iterator[Row]:
    sizes = dict(enumerate(settings["voxel_sizes"]))
    config = DecoderConfig(hidden_size=settings["h"], num_blocks=settings["n_blocks"])
    encoder = NormalizedEncoder(sizes, settings["h"], config.initial_voxel_dropout, INITIAL)
    spec = TargetSpec(INITIAL, "initial", case["z_pred"].shape[1:])
    head = LatentHead(config, spec, shared=False, student=bool(settings["use_cont"]))
    seed = int(case["seed"] if "seed" in case else settings.get("seed", 0))
    encoder_state = voxel_encoder_state(_by_formula(settings["encoder_parameters"], seed), tuple(sizes))
    head_state = latent_head_state(_by_formula(settings["voxel2sd_parameters"], seed))
    _load(encoder, encoder_state, weights_path, torch.float32)
    _load(head, head_state, weights_path, torch.float32)
    shared_BH = encoder(_voxels(case, sizes, torch.float32))
    output = head(shared_BH)
    if "shared" in case:
        yield compare(case.file, "shared", shared_BH, case["shared"], SINGLE)
    yield compare(case.file, "z_pred", output.latent_BCHW, case["z_pred"], LATENT)
    if "z_dtype" in case:
        found, expected = str(output.latent_BCHW.dtype), str(case["z_dtype"])
        yield compare(case.file, "z_dtype", float(found != expected), 0.0, 0.0, f"{found} here, {expected} there")
    if "transformer_feats_every4" in case and output.student_BPD is not None:
        reference = case["transformer_feats_every4"]
        stride = output.student_BPD.shape[1] // reference.shape[1]
        yield compare(case.file, "transformer_feats_every4", output.student_BPD[:, ::stride], reference, SINGLE)


def _check_prior(case: Case, settings: Settings, weights_path: Path) -> Iterator[Row]:
    network = PriorNetwork(
        settings["num_tokens"], settings["dim"], settings["depth"], settings["heads"], settings["dim_head"]
    )
    sample_steps = len(case["ddim20_times"]) + 1 if "ddim20_times" in case else DecoderConfig().prior_sample_steps
    prior = DiffusionPrior(network, GUIDANCE[0], settings["timesteps"], sample_steps, settings["cond_drop_prob"])
    _load(prior, prior_state(_read(weights_path)), weights_path, torch.float32)
    case.mark_read("seed")
    ours = {
        **_prior_schedule(prior),
        **_prior_network(case, prior),
        **_prior_losses(case, prior),
        **_prior_samples(case, prior),
    }
    for quantity in [name for name in case.names if name in ours]:
        exact = quantity.endswith("_times")
        yield compare(case.file, quantity, ours[quantity], case[quantity], 0.0 if exact else SINGLE)


def _prior_schedule(prior: DiffusionPrior) -> dict[str, torch.Tensor]:
    abar_T = prior.abar_T
    return {
        "sched_alphas_cumprod": abar_T,
        "sched_alphas_cumprod_prev": prior.abar_prev_T,
        "sched_sqrt_recip_alphas_cumprod": (1.0 / abar_T).sqrt(),
        "sched_sqrt_recipm1_alphas_cumprod": (1.0 / abar_T - 1.0).sqrt(),
        "sched_sqrt_alphas_cumprod": abar_T.sqrt(),
        "sched_sqrt_one_minus_alphas_cumprod": (1.0 - abar_T).sqrt(),
    }


def _prior_network(case: Case, prior: DiffusionPrior) -> dict[str, torch.Tensor]:
    """Return the network's outputs on the noisy target, with and without condition."""
    if not case.has("x_noisy", "times", "cond"):
        return {}
    noisy, times, condition = case.tensor("x_noisy"), case.tensor("times"), case.tensor("cond")
    none = torch.zeros(len(times), dtype=torch.bool)
    kept = prior.network(noisy, times, condition)
    dropped = prior.network(noisy, times, condition, none, none)
    renoised = (
        {"x_noisy": prior.add_noise(case.tensor("target"), times, case.tensor("noise"))}
        if case.has("target", "noise")
        else {}
    )
    return {
        **renoised,
        "net_keep": kept,
        "net_drop_all": dropped,
        "cond_scale_2": dropped + 2.0 * (kept - dropped),
    }


def _prior_losses(case: Case, prior: DiffusionPrior) -> dict[str, torch.Tensor]:
    """Return training predictions and losses, without drops and with the recorded ones."""
    if not case.has("target", "times", "cond", "noise"):
        return {}
    target, times, condition = case.tensor("target"), case.tensor("times"), case.tensor("cond")
    noisy = prior.add_noise(target, times, case.tensor("noise"))
    plain = prior.network(noisy, times, condition)
    found = {"p_pred_nodrop": plain, "p_loss_nodrop": (plain - target).square().mean()}
    for name in [name for name in case.names if name.startswith("brain_keep_mask_")]:
        suffix = name.removeprefix("brain_keep_mask_")
        if f"image_keep_mask_{suffix}" not in case:
            continue
        keep_condition, keep_target = case.tensor(name), case.tensor(f"image_keep_mask_{suffix}")
        predicted = prior.network(noisy, times, condition, keep_condition, keep_target)
        found[f"p_pred_drop02_{suffix}"] = predicted
        found[f"p_loss_drop02_{suffix}"] = (predicted - target).square().mean()
    return found


def _prior_samples(case: Case, prior: DiffusionPrior) -> dict[str, torch.Tensor]:
    if not case.has("ddim20_noise", "cond"):
        return {}
    return {
        "ddim20_times": torch.tensor(prior.sampling_times()[:-1]),
        "ddim20_sample": prior.sample_with_noise(case.tensor("cond"), case.tensor("ddim20_noise")),
    }


def _by_formula(parameters: list[tuple[str, list[int]]], seed: int) -> State:
    """Return weights that follow from their place in the list, as the layout's formula says."""
    state: State = {}
    for k, (name, shape) in enumerate(parameters):
        wave = torch.sin(0.7 * torch.arange(1, prod(shape) + 1, dtype=torch.float64) + 1.3 * (k + 1 + seed))
        if len(shape) > 1:
            values = wave / prod(shape[1:]) ** 0.5
        else:
            values = 1.0 + 0.1 * wave if name.endswith("weight") else 0.1 * wave
        state[name] = values.reshape(shape).float()
    return state


def _read(path: Path) -> State:
    if not path.is_file():
        raise CheckpointError("A model case has no weights.", where=str(path))
    return load_file(path)


def _load(network: nn.Module, state: State, path: Path, dtype: torch.dtype = torch.float64) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError("A model case's weights do not fit.", where=str(path), found=str(error)) from error
    network.to(dtype).eval()


KINDS = {
    "backbone": _check_token_network,
    "z_pred": _check_latent_network,
    "net_keep": _check_prior,
    "ddim20_sample": _check_prior,
    "p_loss_nodrop": _check_prior,
    "sched_alphas_cumprod": _check_prior,
}
"""An array that only one kind of case holds -> its checker."""
