"""Cases of the guided sampler: one sample, one (kappa, eta, SAG scale) each, listed in ``sampler/index.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nd_dist.config import SamplerConfig
from nd_dist.conformance.networks import LAYER_SCALE, TARGET_NAMES, ReferenceWeights
from nd_dist.conformance.rows import DOUBLE, DOUBLE_IMAGE, SINGLE, Case, Row, compare, not_checked
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.noise import NoiseRequest
from nd_dist.diffusion.sampler import GuidedSampler, SampleOptions, StepRecord
from nd_dist.diffusion.schedule import signal_and_noise
from nd_dist.errors import DataError
from nd_dist.files import read_json
from nd_dist.frozen.clip_vision import layer_name

DTYPES = {"f64": torch.float64, "f32": torch.float32}
ENTRY_KEYS = ("file", "sample", "kappa", "eta", "sag", "cfg", "dtype")
TOLERANCES = {"timesteps": 0.0, "image": DOUBLE_IMAGE}
GRADIENT = "gradient"
"""Derived from two stored arrays: (eps after - eps before) / (kappa sqrt(1 - abar))."""
GRADIENT_SCALE = "gradient scale"


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of all cases that the index lists and the folder holds.

    Raises:
        DataError: the index or the inputs are missing or damaged.
        CheckpointError: the weights are missing or damaged.
    """
    index = folder / "index.json"
    for entry in read_json(index):
        if lacking := [key for key in ENTRY_KEYS if key not in entry]:
            raise DataError("A sampler case's entry lacks keys.", where=str(index), expected=lacking, found=entry)
        path = folder / entry["file"]
        if not path.is_file():
            yield not_checked(path.name, "listed in index.json, but not in this folder")
        elif entry["dtype"] not in DTYPES:
            yield not_checked(path.name, f"dtype {entry['dtype']} is none of {', '.join(DTYPES)}")
        else:
            yield from _check_case(Case(path), Case(folder / "inputs.npz"), entry, folder.parent / "weights")


def _check_case(case: Case, inputs: Case, entry: Mapping[str, Any], weights_dir: Path) -> Iterator[Row]:
    """Yield the rows of one case: every quantity that it holds."""
    ours = _quantities(inputs, entry, weights_dir)
    for quantity in [name for name in case.names if name in ours]:
        yield compare(case.file, quantity, ours[quantity], case[quantity], _tolerance(quantity, entry["dtype"]))
    before_after = ("eps_before_guidance", "eps_after_guidance")
    if all(name in case and name in ours for name in before_after):
        before, after = (case.tensor(name) for name in before_after)
        reference = (after - before) / ours[GRADIENT_SCALE]
        yield compare(case.file, GRADIENT, ours[GRADIENT], reference, _tolerance(GRADIENT, entry["dtype"]))
    yield from case.left_over()


def _tolerance(quantity: str, dtype: str) -> float:
    tolerance = TOLERANCES.get(quantity, DOUBLE)
    return SINGLE if dtype == "f32" and tolerance > 0 else tolerance


def _quantities(inputs: Case, entry: Mapping[str, Any], weights_dir: Path) -> dict[str, torch.Tensor]:
    """Run the sampler on one sample; return everything that a case may hold."""
    dtype, sample = DTYPES[entry["dtype"]], int(entry["sample"])
    kappa, eta = float(entry["kappa"]), float(entry["eta"])
    weights = ReferenceWeights(weights_dir)
    clip = weights.clip(dtype)
    guidance = ClipGuidance(clip, LAYER_SCALE, antialias=True)
    config = SamplerConfig(sag_scale=entry["sag"], cfg_scale=entry["cfg"])
    empty = inputs.tensor("uncond", dtype)
    sampler = GuidedSampler(weights.stable_diffusion(dtype), guidance, config, empty_caption_1LD=empty)

    def row(name: str) -> torch.Tensor:
        return inputs.tensor(name, dtype)[sample : sample + 1]

    targets = {layer_name(name): row(f"g_{name}").reshape(1, *clip.feature_shape) for name in TARGET_NAMES}
    records: list[StepRecord] = []
    options = SampleOptions(noise_BCHW=row("noise"), observe=records.append)
    result = sampler.sample(row("c"), row("z"), targets, [NoiseRequest(sample, 0, 0)], kappa, eta, options)
    plan = sampler.plan(kappa, eta)
    return {
        "timesteps": torch.tensor([step.timestep for step in plan.steps]),
        "z_t": sampler.start(row("z"), row("noise"), plan),
        "latents": torch.cat([record.latents_BCHW for record in records]),
        "image": result.images_BCHW.permute(0, 2, 3, 1),
        "eps_used_first": records[0].eps_after_BCHW,
        **_guided_quantities([record for record in records if record.step.is_guided], kappa),
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
