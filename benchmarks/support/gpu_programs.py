"""The parts of ``benchmarks.gpu_check`` that run whole programs: a training through DeepSpeed, an evaluation."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.gpu_budget import read_budget
from benchmarks.support.gpu_parts import Setting, beside
from benchmarks.support.training_data import make_data
from launch.ranks.train import ShardSource
from nd_dist.comm import Comm
from nd_dist.compute.device import use_device
from nd_dist.config import Config, DecoderConfig, TrainingConfig
from nd_dist.errors import Requeue
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.run import evaluate
from nd_dist.events import EventLog, events_path, read_events
from nd_dist.training.run import train
from nd_dist.world import World

STEPS, STOP_AFTER = 6, 3
SAME = {"cpu": 1e-6, "cuda": 2e-2}
"""Largest relative difference of the losses of a training and of the same one that was stopped and went on."""


def engine(setting: Setting) -> dict[str, Any]:
    """Train a few steps with every ZeRO stage; stop, go on from the checkpoint, and compare the losses."""
    data = make_data(setting.folder, "g02", 300)
    data = data.model_copy(update={"decoder": DecoderConfig(heads="single", hidden_size=64, prior_depth=0)})
    use_device(World(), data)
    found: dict[str, Any] = {}
    for zero_stage in (0, 1, 2, 3):
        dtype = "float32" if zero_stage == 0 or setting.device == "cpu" else "bfloat16"
        straight = _losses(data, f"zero{zero_stage}", zero_stage, dtype, None)
        stopped = _losses(data, f"zero{zero_stage}-stopped", zero_stage, dtype, STOP_AFTER)
        apart = max(abs(a - b) / abs(b) for a, b in zip(stopped, straight, strict=True))
        found[f"ZeRO {zero_stage}, {dtype}"] = {"loss": straight[-1], "after_resume_apart": apart}
    wrong = [name for name, line in found.items() if not line["after_resume_apart"] <= SAME[setting.device]]
    return {"wrong": wrong, "backend": torch.distributed.get_backend(), **found}


def _losses(data: Config, run: str, zero_stage: int, dtype: str, stop_after: int | None) -> list[float]:
    """Return the loss of every step of a training that is perhaps stopped once on the way."""
    training = TrainingConfig(
        stages=(1,),
        targets=("g02",),
        steps=(STEPS, 1),
        checkpoint_every=STEPS,
        validate_every=STEPS,
        zero_stage=zero_stage,
        dtype=dtype,  # type: ignore[arg-type]
    )
    config = data.model_copy(update={"run_dir": data.run_dir.parent / run, "training": training})
    for limit in (STEPS,) if stop_after is None else (stop_after, STEPS):
        asked = itertools.count()
        source, events = ShardSource(config, World()), EventLog(config.run_dir, 0, "train")
        with contextlib.suppress(Requeue):
            train(config, World(), source, events, partial(_is_time, asked, limit))
    steps = [event for event in read_events(events_path(config.run_dir, 0)) if event["event"] == "train_step"]
    return [float(step["loss"]) for step in sorted(steps, key=lambda step: int(step["step"]))]


def _is_time(asked: Iterator[int], limit: int) -> bool:
    """Return whether a training has been asked often enough whether it should stop."""
    return next(asked) >= limit


def training(setting: Setting) -> dict[str, Any]:
    """Time a step of c, z and g at h=4096 with the prior, and of c in a loop like the released one under autocast."""
    is_gpu = setting.device == "cuda"
    sizes = ["--hidden-size", "4096", "--prior-depth", "6", "--steps", "10", "--epoch-steps", "20"]
    if not setting.is_full:
        sizes = ["--hidden-size", "64", "--prior-depth", "1", "--voxels", "300", "--steps", "2", "--epoch-steps", "5"]
    sizes += ["--dtype", "bfloat16" if is_gpu else "float32", "--trials", "500"]
    budget, found = read_budget(), {}
    for target in ("c", "z", "g02") if setting.is_full else ("g02",):
        for variant in ("plain", "nd_dist") if target == "c" or not setting.is_full else ("nd_dist",):
            measured = _measured(variant, [*sizes, "--target", target], setting.folder / target)
            line: dict[str, float] = {"ms": round(1e3 * statistics.median(measured["step_s"]), 2)}
            if variant == "nd_dist":
                path = "train z, 42 rows" if target == "z" else "train c, MixCo, 42 rows"
                cost = budget[path]
                line = {**beside(line["ms"], cost.predicted_ms), "floor_ms": cost.gpu_ms}
                line |= {"waits_for_data": measured["wait"], "predicted_peak_gb": cost.peak_gb}
            found[f"{target}, {variant}"] = {**line, "peak_gb": round(measured["gpu_bytes"] / 1e9, 2)}
    return found


def _measured(variant: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Return what ``benchmarks.training`` measures of a variant, in a process of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.training", *words, "--folder", str(folder), "--only", variant]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def evaluation(setting: Setting) -> dict[str, Any]:
    """Evaluate a toy world whose decoder has a prior, and see on which device the networks ran."""
    from tests.nd_dist.evaluation.toy_world import toy_job, write_models  # folders of real networks at toy width

    write_models(setting.folder, prior_depth=1)
    job = toy_job(setting.folder)
    device = use_device(World(), job.config)
    ran: dict[str, set[str]] = {}

    def note(network: torch.nn.Module, _inputs: object) -> None:
        where = {parameter.device.type for parameter in network.parameters()}
        ran.setdefault(type(network).__name__, set()).update(where)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    job = replace(job, networks=Networks(job.config, device))
    metrics = evaluate(job, Comm(), EventLog(job.config.run_dir, 0, "evaluate"))
    hook.remove()
    elsewhere = sorted(name for name, where in ran.items() if where - {device.type})
    return {"wrong": elsewhere, "device": str(device), "networks": len(ran), "points": len(metrics["points"])}
