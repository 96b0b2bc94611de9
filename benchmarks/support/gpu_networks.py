"""The parts of ``benchmarks.gpu_check`` that run networks in this process: no ranks, no recipe, random weights."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.support.flops import pass_costs
from benchmarks.support.gpu_budget import H100, read_budget
from benchmarks.support.gpu_parts import Setting, apart, beside, median_ms
from benchmarks.support.networks import Width, make_networks
from benchmarks.support.samples import (
    Networks,
    make_samples,
    matmul_rate,
    published_variant,
    sampler_variant,
    timed,
)
from benchmarks.training_memory import SHAPES, VOXELS
from nd_dist.compute.device import platform_facts, use_device
from nd_dist.config import Config, DecoderConfig, FrozenConfig, SamplerConfig
from nd_dist.evaluation.reconstruction.decode import BATCH, DecoderFolder
from nd_dist.frozen.extractor import FrozenExtractor
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec, role_of
from nd_dist.world import World

PICTURES, CAPTIONS = 64, 5
PAPER_DECODER = DecoderConfig(heads="single")
TOY_DECODER = DecoderConfig(heads="single", hidden_size=64, prior_depth=1)
CLOSE = {"float32": 2e-2, "bfloat16": 0.3}
"""Largest differences from float64, as a share of the largest value: rounding of TF32 and bfloat16, layers on."""


class OneCaption:
    """A tokenizer that gives every caption the same tokens."""

    def __call__(self, captions: Sequence[str], max_length: int, **_: Any) -> SimpleNamespace:
        """Return token ids (B, L)."""
        return SimpleNamespace(input_ids=torch.zeros(len(captions), max_length, dtype=torch.int64))


def make_extractor(width: Width, device: str, dtype: torch.dtype, batch_size: int) -> FrozenExtractor:
    """Return an extractor with random weights, made on the device."""
    sd, clip = make_networks(width, device, dtype)
    tokens, hidden = width.text
    with torch.device(device):
        settings = CLIPTextConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_attention_heads=max(1, hidden // 64),
            max_position_embeddings=tokens,
        )
        text_encoder = CLIPTextModel(settings).requires_grad_(False).eval()
    sd.vae.to(memory_format=torch.channels_last)
    sd.unet.to("meta")  # as ``load`` leaves a part that is not run
    return FrozenExtractor(
        replace(sd, text_encoder=text_encoder, tokenizer=OneCaption()), clip, FrozenConfig(batch_size=batch_size), 42
    )


def make_predictor(targets: Sequence[str], device: str, config: DecoderConfig) -> DecoderFolder:
    """Return the published decoders of some targets for subject 1 with random weights, made on the device."""
    predictor = DecoderFolder(SimpleNamespace(), torch.device(device))  # type: ignore[arg-type]  # nothing is read
    with torch.device(device):
        specs = [TargetSpec(name, role_of(name), SHAPES[name]) for name in targets]
        predictor.__dict__["_decoder"] = Decoder(config, {1: VOXELS[1]}, specs).eval()
    return predictor


def machine(setting: Setting) -> dict[str, Any]:
    """Say what the machine is, and measure the floors under everything else."""
    device, side = setting.device, 8192 if setting.is_full else 64
    is_gpu = device == "cuda"
    values = torch.empty((1 << 28) if setting.is_full else (1 << 16), dtype=torch.uint8, pin_memory=is_gpu)
    there = torch.empty_like(values, device=device, pin_memory=False)
    one = torch.ones(1, device=device)

    def launches() -> torch.Tensor:
        for _ in range(1000):
            one.add_(0.0)
        return one

    def gigabytes_s(source: torch.Tensor, passes: int) -> float:
        copied = partial(there.copy_, source, non_blocking=True)
        return round(passes * source.numel() / median_ms(copied, device) / 1e6, 1)

    return {
        **platform_facts(torch.device(device)),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if is_gpu else "",
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if is_gpu else 0.0,
        "tflops": {
            name: round(matmul_rate(device, getattr(torch, name), side) / 1e12, 3) for name in ("float32", "bfloat16")
        },
        "to_device_gb_s": gigabytes_s(values, 1),
        "to_device_pageable_gb_s": gigabytes_s(values.clone(), 1),
        "memory_gb_s": gigabytes_s(torch.empty_like(there), 2),
        "launch_us": round(median_ms(launches, device), 2),
        "assumed": {"tflops": H100.flops["bfloat16"] / 1e12, "memory_gb_s": H100.bytes_s / 1e9, "launch_us": 8.0},
    }


def _moved(networks: Networks, device: str, dtype: torch.dtype) -> Networks:
    """Return copies of networks on a device."""
    sd, clip = copy.deepcopy(networks)
    for network in (sd.unet, sd.vae, clip.tower):
        torch.nn.Module.to(network, device=device, dtype=dtype)
    return sd, clip


def _pictures(networks: Networks, setting: Setting) -> torch.Tensor:
    """Return the pictures of a short guided run, SAG on."""
    config = SamplerConfig(num_steps=4, eta=0.5, sag_scale=0.75, max_rows=2)
    samples, empty = make_samples(networks, setting.width.text, 2, 1)
    return sampler_variant("", networks, config, empty).run(samples)


def correctness(setting: Setting) -> dict[str, Any]:
    """Compare toy networks with float64 on the CPU, and two runs with each other."""
    toy = replace(setting, size="toy")
    exact = make_networks(toy.width, "cpu", torch.float64)
    wanted = _pictures(exact, toy)
    decoder = make_predictor(("c", "z"), "cpu", TOY_DECODER)._decoder
    voxels, seeds = torch.randn(2, VOXELS[1], generator=torch.Generator().manual_seed(0)), range(2)
    predicted = copy.deepcopy(decoder).double().predict(voxels, 1, seeds)
    wrong, differences, equal = [], {}, {}
    for name in ("float32", "bfloat16"):
        networks = _moved(exact, setting.device, getattr(torch, name))
        differences[f"pictures, {name}"] = apart(_pictures(networks, toy), wanted)
        if name == "float32":  # decoding runs in float32
            found = copy.deepcopy(decoder).to(setting.device).predict(voxels, 1, seeds)
            differences |= {f"decoded {key}, {name}": apart(found[key], predicted[key]) for key in found}
        wrong += [what for what, by in differences.items() if what.endswith(name) and not by <= CLOSE[name]]
    networks = _moved(exact, setting.device, torch.float32)
    for is_deterministic in (False, True):
        use_device(World(), Config(deterministic=is_deterministic))
        first, again = _pictures(networks, toy), _pictures(networks, toy)
        equal["deterministic" if is_deterministic else "default"] = bool(torch.equal(first, again))
    if not equal["deterministic"]:
        wrong.append("two deterministic runs differ")
    return {"wrong": wrong, "differences": differences, "two_runs_are_equal": equal}


def sampler(setting: Setting) -> dict[str, Any]:
    """Time the sampler at several batch sizes beside the published procedure under float16 autocast."""
    width, device = setting.width, setting.device
    config = SamplerConfig(dtype="bfloat16", sag_scale=0.75, num_steps=50 if setting.is_full else 4)
    wide = make_networks(width, device, torch.float32)
    samples, empty = make_samples(wide, width.text, 1, 1)
    autocast = torch.float16 if device == "cuda" else None
    published = partial(published_variant(wide, config, empty, autocast).run, samples)
    published_s = timed(published, device)[1].wall_s
    own = _moved(wide, device, torch.bfloat16)
    del wide, published
    for network in (own[0].unet, own[0].vae):
        network.to(memory_format=torch.channels_last)
    rate, costs = matmul_rate(device, torch.bfloat16, 8192 if setting.is_full else 64), pass_costs(width)
    lines = {}
    for rows in (1, 5, 20) if setting.is_full else (1, 2):
        samples, empty = make_samples(own, width.text, rows, 1)
        variant = sampler_variant("", own, config, empty)
        took_ms = median_ms(partial(variant.run, samples), device, rounds=1)
        lines[f"{rows} rows"] = {
            "pictures_s": round(1e3 * rows / took_ms, 4),
            "times_published": round(1e3 * published_s * rows / took_ms, 2),
            "share_of_floor": round(1e3 * rows * variant.flops(costs) / took_ms / rate, 4),
            **(beside(took_ms, _sampler_ms(config)) if rows == 5 else {"ms": round(took_ms, 1)}),
        }
    return {"published_s": round(published_s, 3), **lines}


def _sampler_ms(config: SamplerConfig) -> float:
    """Return what the budget predicts for five rows."""
    budget, steps = read_budget(), int(config.num_steps * config.strength)
    guided = int(steps * config.eta)
    each = {kind: budget[f"sampler: {kind}"].predicted_ms for kind in ("guided step, 5 rows", "plain step, 5 rows")}
    of_steps = guided * each["guided step, 5 rows"] + (steps - guided) * each["plain step, 5 rows"]
    return of_steps + budget["sampler: decode 5 pictures"].predicted_ms


def extraction_and_decoding(setting: Setting) -> dict[str, Any]:
    """Time packing's networks and decoding, with the host's share."""
    budget, found = read_budget(), {}
    use_device(World(), Config())
    num = PICTURES if setting.is_full else 4
    paths = {"c": f"{CAPTIONS * PICTURES} captions", "z": f"{PICTURES} pictures", "g02": f"{PICTURES} pictures"}
    for name in ("float32", "bfloat16"):
        extractor = make_extractor(setting.width, setting.device, getattr(torch, name), num)
        for target, path in paths.items():
            line = _with_host_share(partial(extract, extractor, target, num))
            line |= beside(line["ms"], budget[f"extract {target}, {path}"].predicted_ms)
            found[f"extract {target}, {name}"] = {**line, "pictures_s": round(1e3 * num / line["ms"], 1)}
        del extractor
        gc.collect()
    config, num = (PAPER_DECODER, BATCH) if setting.is_full else (TOY_DECODER, 2)
    predictor = make_predictor(("c", "z"), setting.device, config)
    voxels, seeds = np.zeros((num, VOXELS[1]), dtype=np.float32), list(range(num))
    for target in ("c", "z"):
        line = _with_host_share(partial(predictor.predict, target, 1, voxels, seeds))
        found[f"decode {target}"] = {**line, **beside(line["ms"], budget[f"decode {target}, 32 images"].predicted_ms)}
    return found


def extract(extractor: FrozenExtractor, target: str, num: int = PICTURES) -> dict[str, Any]:
    """Extract one target of some pictures as NSD has them."""
    pictures = np.zeros((num, 425, 425, 3), dtype=np.uint8)
    return dict(extractor.extract(pictures, [["a"] * CAPTIONS] * num, range(num), (target,)))


def _with_host_share(run: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds of a call whose result is on the host, and the processor's seconds in a second of it."""
    run()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return {"ms": round(1e3 * wall_s, 2), "host_share": round(cpu_s / wall_s, 2)}


@contextmanager
def _capped(memory_gb: float, setting: Setting) -> Iterator[None]:
    """Let torch have no more than a smaller card's memory."""
    if setting.device == "cpu":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def memory(setting: Setting) -> dict[str, Any]:
    """Sample and extract on what smaller cards have; each pass has to find a size that fits."""
    found: dict[str, Any] = {}
    num = PICTURES if setting.is_full else 2
    config = SamplerConfig(dtype="bfloat16", num_steps=2, eta=1.0)
    for memory_gb in (16.0, 24.0):
        with _capped(memory_gb, setting):
            own = make_networks(setting.width, setting.device, torch.bfloat16)
            samples, empty = make_samples(own, setting.width.text, 5, 1)
            sampler_variant("", own, config, empty).run(samples)
            found[f"{memory_gb:.0f} GB"] = {"sampler_peak_gb": _peak_gb(setting)}
            del own, samples, empty
        with _capped(memory_gb, setting):
            extract(make_extractor(setting.width, setting.device, torch.float32, num), "z", num)
            found[f"{memory_gb:.0f} GB"]["extraction_peak_gb"] = _peak_gb(setting)
    return found


def _peak_gb(setting: Setting) -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if setting.device == "cuda" else 0.0
