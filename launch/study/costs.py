"""What a study takes, before anything starts: steps, hours, memory, disk and files of every stage, counted from sizes.

Times are those of ``gpu_budget.json``: operations of each path at the published sizes, counted on a pretended GPU, at
rates that an H100 is assumed to reach (docs/gpu.md). They hold for the published networks only; for others steps and
pictures are counted and nothing else. Data sizes are NSD's known counts. No data, network or GPU is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from launch.console import make_console
from launch.keys import nearest
from launch.study.plan import Stage, plan_study
from launch.study.run import is_done
from launch.study.study import Study
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.evaluation.points.axes import config_at
from nd_dist.evaluation.points.units import Point, config_points, distinct_points
from nd_dist.evaluation.reconstruction.costs import SECONDS_PER_HOUR, duration, unit_steps
from nd_dist.files import read_json
from nd_dist.models.decoder import Decoder
from nd_dist.schema import INITIAL, SEMANTIC, TargetSpec, role_of
from nd_dist.training import ridge
from shards.sources.known import NSD, KnownCounts

BUDGET = Path(__file__).with_name("gpu_budget.json")
PUBLISHED_MODEL, PUBLISHED_WIDTH = "CompVis/stable-diffusion-v1-4", 4096
SHAPES: dict[str, tuple[int, ...]] = {SEMANTIC: (77, 768), INITIAL: (4, 64, 64)}
GUIDANCE_SHAPE = (50, 768)
ROWS, REPEATS, BATCH = 42, 5, 64  # of the budget's paths
SHARED = 1000  # pictures that every subject of NSD is shown
PICTURE_BYTES, RECONSTRUCTION_BYTES = 330e3, 450e3  # of a PNG at 425 and at 512 pixels: assumed
FEATURE_BYTES = 0.8e6  # of the field's judges for one picture
STATE_BYTES, MODEL_BYTES = 14, 8  # of a parameter: in a checkpoint; in the last and the best model
STAGE_FILES = 15  # of a training's stage


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Args:
        memory_gb: Its memory.
        slower: How many times longer than an H100 it takes, by its peak in bfloat16.
    """

    memory_gb: int
    slower: float


GPUS = {"h100": Gpu(80, 1.0), "h200": Gpu(141, 1.0), "a100": Gpu(80, 3.2), "l40s": Gpu(48, 2.7)}
RIDGE_FLOPS = 30e12  # float64 operations a second of an H100: assumed


@dataclass(frozen=True)
class Cost:
    """What stages take; seconds are those of one H100.

    Args:
        work: Training steps, pictures to pack, or pictures to make.
        seconds, memory_gb, disk_gb, files: What it takes and leaves; 0 where the networks are not the published ones.
    """

    work: int
    seconds: float = 0.0
    memory_gb: float = 0.0
    disk_gb: float = 0.0
    files: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both; of the memory the larger one."""
        return Cost(
            self.work + other.work,
            self.seconds + other.seconds,
            max(self.memory_gb, other.memory_gb),
            self.disk_gb + other.disk_gb,
            self.files + other.files,
        )


def _budget(path: str, key: str = "gpu_ms") -> float:
    """Return what a path of the budget takes: milliseconds, or ``peak_gb``."""
    content: dict[str, Any] = read_json(BUDGET)
    return float(content["paths"][path][key])


def is_published(config: Config) -> bool:
    """Return whether a recipe's networks have the sizes that were counted."""
    return config.model == PUBLISHED_MODEL and config.decoder.hidden_size == PUBLISHED_WIDTH


def subject_counts(config: Config) -> dict[int, KnownCounts]:
    """Return what each subject holds: NSD's counts, or those of the phantom that a recipe makes."""
    if is_published(config):
        return {subject: NSD[subject] for subject in config.data.subjects if subject in NSD}
    phantom = config.phantom
    trials = phantom.num_sessions * phantom.trials_per_session
    counts = KnownCounts(
        phantom.num_sessions, trials, trials // 3, phantom.num_shared, 3 * phantom.num_shared, phantom.num_voxels
    )
    return dict.fromkeys(config.data.subjects, counts)


def cost_of(stage: Stage) -> Cost:
    """Return what a stage takes."""
    counts = subject_counts(stage.config)
    if stage.kind == "pack":
        return _pack_cost(stage.config, counts)
    if stage.kind == "evaluate":
        return _evaluation_cost(stage.config, counts[stage.subject])
    if stage.config.decoder.kind == "ridge":
        return _ridge_cost(stage.config, counts[stage.subject])
    return _training_cost(stage, counts)


def specs_of(names: Iterable[str]) -> list[TargetSpec]:
    """Return targets at their published sizes."""
    return [TargetSpec(name, role_of(name), SHAPES.get(name, GUIDANCE_SHAPE)) for name in names]


def _pack_cost(config: Config, counts: dict[int, KnownCounts]) -> Cost:
    data = config.data
    pictures = sum(each.images - each.test_images for each in counts.values()) + SHARED
    if not is_published(config):
        return Cost(pictures)
    width = 2 if data.target_dtype == "float16" else 4
    numbers = sum(spec.numel for spec in specs_of(data.targets))
    voxels = sum(each.trials * each.voxels for each in counts.values()) * (2 if data.voxel_dtype == "float16" else 4)
    shown = {"none": 0, "test": SHARED, "all": pictures}[data.pictures]
    paths = {SEMANTIC: "extract c, 320 captions", INITIAL: "extract z, 64 pictures"}
    milliseconds = sum(_budget(paths.get(name, "extract g02, 64 pictures")) for name in data.targets)
    stores = len(data.targets) + bool(shown)
    files = sum(each.sessions for each in counts.values()) + stores * -(-pictures // data.images_per_shard)
    peak = _budget("extract z, 64 pictures", "peak_gb")
    bytes_ = voxels + pictures * numbers * width + shown * PICTURE_BYTES
    return Cost(pictures, milliseconds / 1e3 * pictures / BATCH, peak, bytes_ / 1e9, files)


def _training_cost(stage: Stage, counts: dict[int, KnownCounts]) -> Cost:
    config, total = stage.config, Cost(0)
    is_single = config.decoder.heads == "single"
    stages = [number for number in config.training.stages if number == 2 or stage.stage1_of is None]
    for targets in [(name,) for name in config.training.targets] if is_single else [config.training.targets]:
        own = config.training.model_copy(update={"targets": targets})
        for number in stages:
            steps, samples = own.schedule(number)
            if not is_published(config):
                total += Cost(steps)
                continue
            subjects = [s for s in counts if (s == stage.subject) == (number == 2)]
            rows = samples * len(subjects)
            seconds = sum(_step(name) for name in targets) / 1e3 * max(1.0, rows / ROWS) * steps
            size = _num_parameters(config, {s: counts[s].voxels for s in subjects}, targets)
            copies = 2 if is_single and number == max(stages) else 1  # the decoder of all targets holds one more
            disk = size * (MODEL_BYTES * copies + STATE_BYTES * config.training.keep_checkpoints) / 1e9
            total += Cost(steps, seconds, max(_step(name, "peak_gb") for name in targets), disk, STAGE_FILES)
    return total


def _step(target: str, key: str = "gpu_ms") -> float:
    """Return what a training step of a target takes; targets g count as c."""
    return _budget("train z, 42 rows" if target == INITIAL else "train c, MixCo, 42 rows", key)


def _num_parameters(config: Config, num_voxels: dict[int, int], targets: Sequence[str]) -> int:
    """Return the number of a decoder's parameters, which are not allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config.decoder, num_voxels, specs_of(targets)).parameters())


def _ridge_cost(config: Config, counts: KnownCounts) -> Cost:
    if not is_published(config):
        return Cost(0)
    sessions = config.training.sessions
    share = 1.0 if sessions is None else len(sessions) / counts.sessions
    images = round((counts.images - counts.test_images) * share)
    found = ridge.Cost.of(images, counts.voxels, specs_of(config.training.targets))
    return Cost(0, found.operations / RIDGE_FLOPS, found.device_bytes / 1e9, found.disk_bytes / 1e9, 20)


def _evaluation_cost(config: Config, counts: KnownCounts) -> Cost:
    evaluation, points = config.evaluation, distinct_points(config_points(config))
    images = min(counts.test_images, evaluation.num_images or counts.test_images)
    pictures = images * len(points) * evaluation.num_repeats
    if not is_published(config):
        return Cost(pictures)
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    steps = [unit_steps(config_at(config, family[0]), family) for family in families.values()]
    passes = images * evaluation.num_repeats / REPEATS
    guided, plain, decode = map(_budget, _SAMPLER)
    work = guided * sum(each.guided for each in steps) + plain * sum(each.plain for each in steps)
    seconds = (work + decode * len(points)) / 1e3 * passes
    disk = pictures * (RECONSTRUCTION_BYTES + FEATURE_BYTES) / 1e9
    files = images * len(points) * (evaluation.num_repeats + 3)
    return Cost(pictures, seconds, _budget(_SAMPLER[0], "peak_gb"), disk, files)


_SAMPLER = ("sampler: guided step, 5 rows", "sampler: plain step, 5 rows", "sampler: decode 5 pictures")
_NOTES = """\
How it was counted: operations of each path at the published sizes, on a pretended GPU, at the rates that docs/gpu.md
assumes of an H100; another kind of GPU by its peak in bfloat16. No GPU has confirmed these hours:
`python -m benchmarks.gpu_check` measures the same paths on yours. Weights are part of the memory,
libraries' workspaces are not. Not counted: reading betas and writing shards (hours of a disk), judging pictures,
validation, the queue.
Targets g cost at most what c does, and count as c."""
_OTHER_NETWORKS = "Hours, memory, disk and files are counted for the published networks only; these are others."


def print_costs(study: Study, gpu: str, gpus: int) -> None:
    """Print what every group of stages and the whole study take, what of it is done, and how it was counted.

    Args:
        study: The study.
        gpu: Kind of GPU.
        gpus: How many share the work.

    Raises:
        ConfigError: there is no such kind; or the study is wrong.
    """
    if gpu not in GPUS:
        raise ConfigError(
            "This kind of GPU is not known.", found=gpu, expected=", ".join(GPUS), todo=nearest(gpu, GPUS)
        )
    console, kind, plan = make_console(), GPUS[gpu], plan_study(study)
    groups: dict[str, list[Stage]] = {}
    for stage in plan:
        groups.setdefault(stage.group, []).append(stage)
    costs = {group: reduce(Cost.__add__, map(cost_of, stages)) for group, stages in groups.items()}
    table = Table("stage", "how many", "done", "steps or pictures", f"{gpu} hours", "GPU memory", "disk", "files")
    for group, stages in groups.items():
        done = sum(is_done(study, stage) for stage in stages)
        table.add_row(group, str(len(stages)), str(done), *_cells(costs[group], kind))
    whole = reduce(Cost.__add__, costs.values())
    table.add_row("all", str(len(plan)), "", "", *_cells(whole, kind)[1:])
    console.print(table, soft_wrap=False)
    console.print(_shared(study, plan))
    if not whole.seconds:
        console.print(_OTHER_NETWORKS)
        return
    span = duration(whole.seconds * kind.slower / gpus)
    console.print(f"{span} with {gpus} {gpu} (--gpus), if all are at work all the time.")
    if whole.memory_gb > kind.memory_gb:
        console.print(f"A stage wants {whole.memory_gb:.0f} GB, this GPU has {kind.memory_gb}: it halves its batches.")
    console.print(_NOTES)


def _shared(study: Study, plan: Sequence[Stage]) -> str:
    """Return how often tables ask for a way to reconstruct, and how many are made of one subject and seed."""
    evaluations = {stage.decoder: config_points(stage.config) for stage in plan if stage.kind == "evaluate"}
    configs = {stage.decoder: stage.config for stage in plan}
    asked = [name for table in study.tables for name in table.rows.values()]
    rows = sum(len(study.runs[name].points(configs[study.decoder_of(name)])) for name in asked)
    made = sum(map(len, evaluations.values()))
    return f"{rows} rows of {len(study.tables)} tables need {made} points of each subject and seed, made once each."


def _cells(cost: Cost, gpu: Gpu) -> list[str]:
    """Return the cells of a row: work, hours, memory, disk, files; a dash where nothing was counted."""
    if not cost.seconds:
        return [f"{cost.work:,}", *"––––"]
    hours = cost.seconds * gpu.slower / SECONDS_PER_HOUR
    return [
        f"{cost.work:,}",
        f"{hours:,.1f}",
        f"{cost.memory_gb:.0f} GB",
        f"{cost.disk_gb:,.0f} GB",
        f"{cost.files:,}",
    ]
