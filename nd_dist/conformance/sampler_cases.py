"""Cases of the guided sampler: one sample, one (kappa, eta, SAG scale) each, run alone as the released code does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nd_dist.conformance.networks import LAYER_SCALE, TARGET_NAMES, ReferenceWeights
from nd_dist.conformance.rows import DOUBLE, DOUBLE_IMAGE, SINGLE, Case, Row, compare, isolated, not_checked
from nd_dist.conformance.sampler_index import SamplerCase, listed_entries, read_case
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions, StepRecord
from nd_dist.diffusion.schedule import signal_and_noise
from nd_dist.errors import DataError
from nd_dist.frozen.clip_vision import layer_name

DTYPES = {"f64": torch.float64, "f32": torch.float32}
TOLERANCES = {"timesteps": 0.0, "guided_steps": 0.0, "image": DOUBLE_IMAGE}
GRADIENT = "gradient"
"""Derived from two stored arrays: (eps after - eps before) / (kappa sqrt(1 - abar))."""
GRADIENT_SCALE = "gradient scale"


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of all cases that the indices list or that their names describe, as far as the folder has them.

    Raises:
        DataError: an index is damaged.
    """
    for name, entry in listed_entries(folder):
        if (folder / name).is_file():
            yield from isolated(name, _check_entry(folder, entry))
        else:
            yield not_checked(name, "listed in the index, but not in this folder")


def _check_entry(folder: Path, entry: Mapping[str, Any]) -> Iterator[Row]:
    settings = read_case(entry)
    if settings.dtype not in DTYPES:
        raise DataError("The case's dtype is not known.", expected=" or ".join(DTYPES), found=settings.dtype)
    if settings.unknown:
        yield not_checked(settings.file, f"keys of its index entry: {', '.join(settings.unknown)}")
    case, inputs = Case(folder / settings.file), Case(folder / settings.inputs)
    yield from _check_case(case, inputs, settings, ReferenceWeights(folder.parent / "weights"))


def _check_case(case: Case, inputs: Case, settings: SamplerCase, weights: ReferenceWeights) -> Iterator[Row]:
    """Yield the rows of one case: every quantity that it or its index entry holds."""
    ours = _quantities(inputs, settings, weights)
    for quantity in [name for name in case.names if name in ours]:
        yield compare(case.file, quantity, ours[quantity], case[quantity], _tolerance(quantity, settings.dtype))
    before_after = ("eps_before_guidance", "eps_after_guidance")
    if case.has(*before_after) and GRADIENT in ours:
        before, after = (case.tensor(name) for name in before_after)
        reference = (after - before) / ours[GRADIENT_SCALE]
        yield compare(case.file, GRADIENT, ours[GRADIENT], reference, _tolerance(GRADIENT, settings.dtype))
    for quantity, value in settings.facts.items():
        yield compare(case.file, quantity, ours[quantity], value, _tolerance(quantity, settings.dtype))
    yield from case.left_over()


def _tolerance(quantity: str, dtype: str) -> float:
    tolerance = TOLERANCES.get(quantity, DOUBLE)
    return SINGLE if dtype == "f32" and tolerance > 0 else tolerance


def _quantities(inputs: Case, settings: SamplerCase, weights: ReferenceWeights) -> dict[str, torch.Tensor]:
    """Run the sampler on one sample; return everything that a case may hold."""
    dtype, sample, kappa, eta = DTYPES[settings.dtype], settings.sample, settings.kappa, settings.eta
    clip = weights.clip(dtype)
    guidance = ClipGuidance(clip, LAYER_SCALE, antialias=True)
    empty = inputs.tensor("uncond", dtype)
    sampler = GuidedSampler(weights.stable_diffusion(dtype), guidance, settings.config, empty_caption_1LD=empty)

    def row(name: str) -> torch.Tensor:
        if not 0 <= sample < len(inputs[name]):
            raise DataError("The inputs lack this sample.", where=f"{inputs.file}, {name}", found=f"sample {sample}")
        return inputs.tensor(name, dtype)[sample : sample + 1]

    plan = sampler.plan(kappa, eta)
    named = {layer_name(name): f"g_{name}" for name in TARGET_NAMES} if plan.steps[0].is_guided else {}
    targets = {name: row(stored).reshape(1, *clip.feature_shape) for name, stored in named.items()}
    records: list[StepRecord] = []
    options = SampleOptions(noise_BCHW=row("noise"), observe=records.append)
    result = sampler.sample(row("c"), row("z"), targets, [NoiseRequest(sample, 0, 0)], kappa, eta, options)
    guided = [record for record in records if record.step.is_guided]
    return {
        "timesteps": torch.tensor([step.timestep for step in plan.steps]),
        "z_t": sampler.start(row("z"), row("noise"), plan),
        "latents": torch.cat([record.latents_BCHW for record in records]),
        "image": result.images_BCHW.permute(0, 2, 3, 1),
        "eps_used_first": records[0].eps_after_BCHW,
        "final_abs_mean": result.latents_BCHW.abs().mean(),
        "guided_steps": torch.tensor(len(guided)),
        **_guided_quantities(guided, kappa),
    }


def _guided_quantities(guided: Sequence[StepRecord], kappa: float) -> dict[str, torch.Tensor]:
    """Return what only guided steps have, one row per step."""
    if not guided:
        return {}
    before = torch.cat([record.eps_before_BCHW for record in guided])
    after = torch.cat([record.eps_after_BCHW for record in guided])
    noise = before.new_tensor([signal_and_noise(record.step.alpha_cumprod)[1] for record in guided])
    scale = kappa * noise[:, None, None, None]
    return {
        "eps_before_guidance": before,
        "eps_after_guidance": after,
        "guidance_loss": torch.cat([record.loss_B for record in guided]),
        GRADIENT_SCALE: scale,
        GRADIENT: (after - before) / scale,
    }
