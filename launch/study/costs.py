"""What a study takes, before anything starts: work, hours, memory, disk and files of every stage, counted from sizes.

Steps, rows, memory, checkpoints, shards and pictures are counted by what plans and estimates real runs, for data sets
whose counts are known; nothing is opened. Times are those of ``gpu_budget.json``: operations of each path at the
published sizes, counted on a pretended GPU, at rates that an H100 is assumed to reach (docs/gpu.md). Networks of other
sizes have steps and pictures counted, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from launch.console import make_console
from launch.keys import nearest
from launch.study.plan import Stage, plan_study
from launch.study.run import is_done
from launch.study.study import Study
from launch.supervise.memory import checkpoint_bytes, needed_bytes, stage_counts
from nd_dist.config import Config
from nd_dist.errors import ConfigError
from nd_dist.evaluation.points.axes import config_at
from nd_dist.evaluation.points.units import config_points, plan_bundles
from nd_dist.evaluation.reconstruction.costs import (
    SECONDS_PER_HOUR,
    DiskUse,
    StepCost,
    cost_class,
    duration,
    estimate,
    unit_steps,
)
from nd_dist.files import read_json
from nd_dist.schema import INITIAL, SEMANTIC, TargetSpec, role_of
from nd_dist.training import ridge
from nd_dist.training.source import stage_request
from shards.packing.plan import plan
from shards.sources.contract import SubjectDesign
from shards.sources.known import NSD, KnownCounts, laion_fmri_counts

BUDGET = Path(__file__).with_name("gpu_budget.json")
PUBLISHED = ("CompVis/stable-diffusion-v1-4", 4096)
SHAPES: dict[str, tuple[int, ...]] = {SEMANTIC: (77, 768), INITIAL: (4, 64, 64)}
GUIDANCE_SHAPE = (50, 768)
ROWS, REPEATS, BATCH = 42, 5, 64  # of the budget's paths
GUESSED_VOXELS = 15_000  # of a subject whose voxels nobody has counted
PICTURE_BYTES = 450e3  # of a PNG at 512 pixels: assumed
RIDGE_FLOPS = 30e12  # float64 operations a second of an H100: assumed
STAGE_FILES = 15  # that a training's stage leaves: as many as on the phantom
GPUS = {"h100": (80, 1.0), "h200": (141, 1.0), "a100": (80, 3.2), "l40s": (48, 2.7)}
"""Kind -> memory in GB, and how many times longer than an H100 it takes, by its peak in bfloat16."""


@dataclass(frozen=True)
class Cost:
    """What stages take; seconds are those of one H100.

    Args:
        work: Training steps, pictures to pack, or pictures to make.
        seconds, memory_gb, disk_gb, files: What it takes and leaves; 0 where nothing was counted.
    """

    work: int = 0
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

    def times(self, count: int) -> Cost:
        """Return the cost of several of them."""
        return Cost(count * self.work, count * self.seconds, self.memory_gb, count * self.disk_gb, count * self.files)


@dataclass(frozen=True)
class CountedReader:
    """Stands for a data set that is not at hand, for the plan of its packing: its counts with made-up image ids."""

    counts: dict[int, KnownCounts]
    num_images = 0

    def design(self, subject: int) -> SubjectDesign:
        """Return a design of as many trials, images and sessions."""
        own = self.counts[subject]
        shared = max(each.test_images for each in self.counts.values())
        first = shared + sum(each.images for s, each in self.counts.items() if s < subject)
        seen = np.arange(own.test_trials) % own.test_images
        alone = first + np.arange(own.trials - own.test_trials) % (own.images - own.test_images)
        image_id = np.concatenate([seen, alone])
        session = 1 + np.arange(own.trials) * own.sessions // own.trials
        return SubjectDesign(subject, own.voxels, session, image_id, image_id < shared, {})

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return pictures of NSD's size."""
        return np.zeros((len(image_ids), 425, 425, 3), np.uint8)

    def captions(self, image_ids: Sequence[int]) -> list[tuple[str, ...]]:
        """Return none."""
        return [()] * len(image_ids)


def known_counts(config: Config) -> dict[int, KnownCounts]:
    """Return what each subject of a recipe holds; nothing where networks or data set are none of the published."""
    if (config.model, config.decoder.hidden_size) != PUBLISHED or config.data.reader not in ("nsd", "laion_fmri"):
        return {}
    guess = KnownCounts(30, 0, 0, 0, 0, GUESSED_VOXELS)
    found = {
        subject: laion_fmri_counts(subject, guess) if config.data.reader == "laion_fmri" else NSD.get(subject)
        for subject in config.data.subjects
    }
    return {subject: counts for subject, counts in found.items() if counts is not None}


def cost_of(stage: Stage) -> Cost:
    """Return what a stage takes."""
    config, counts = stage.config, known_counts(stage.config)
    if stage.kind == "pack":
        return _pack_cost(config, counts) if counts else Cost()
    if stage.kind == "evaluate":
        return _evaluation_cost(config, counts)
    if config.decoder.kind == "ridge":
        return _ridge_cost(config, counts[config.training.target_subject]) if counts else Cost()
    return _training_cost(stage, counts)


@cache
def _budget(path: str, key: str = "gpu_ms") -> float:
    """Return what a path of the budget takes: milliseconds, or ``peak_gb``."""
    content: dict[str, Any] = read_json(BUDGET)
    return float(content["paths"][path][key])


def _specs(names: Iterable[str]) -> list[TargetSpec]:
    """Return targets at their published sizes."""
    return [TargetSpec(name, role_of(name), SHAPES.get(name, GUIDANCE_SHAPE)) for name in names]


def _pack_cost(config: Config, counts: dict[int, KnownCounts]) -> Cost:
    data = config.data.model_copy(update={"subjects": tuple(counts)})
    reader: Any = CountedReader(counts)  # Any: planning reads no session, so it needs no reader's other half
    planned = plan(data, reader, _specs(data.targets))
    paths = {SEMANTIC: "extract c, 320 captions", INITIAL: "extract z, 64 pictures"}
    milliseconds = sum(_budget(paths.get(name, "extract g02, 64 pictures")) for name in data.targets)
    seconds = milliseconds / 1e3 * planned.num_packed_images / BATCH
    peak = _budget("extract z, 64 pictures", "peak_gb")
    return Cost(planned.num_packed_images, seconds, peak, planned.num_bytes / 1e9, planned.num_shards)


def _training_cost(stage: Stage, counts: dict[int, KnownCounts]) -> Cost:
    config = stage.config
    numbers = tuple(number for number in config.training.stages if number == 2 or stage.borrowed is None)
    is_single = config.decoder.heads == "single"
    total = Cost()
    for targets in [(name,) for name in config.training.targets] if is_single else [config.training.targets]:
        training = config.training.model_copy(update={"targets": targets, "stages": numbers})
        own = config.model_copy(update={"training": training})
        total += Cost(sum(training.schedule(number)[0] for number in numbers))
        if counts:
            total += _counted_training(own, counts)
    return total


def _counted_training(config: Config, counts: dict[int, KnownCounts]) -> Cost:
    """Return what the training of a network takes beside its steps."""
    training = config.training
    sizes = stage_counts(config, {s: own.voxels for s, own in counts.items()}, _specs(training.targets), 1)
    memory = max(needed_bytes(sizes, training, 1).values()) / 1e9
    seconds = 0.0
    for number in training.stages:
        rows = max(1.0, stage_request(config, number, 1).num_rows / ROWS)
        step = sum(
            _budget("train z, 42 rows" if name == INITIAL else "train c, MixCo, 42 rows") for name in training.targets
        )
        seconds += step / 1e3 * rows * training.schedule(number)[0]
    return Cost(0, seconds, memory, checkpoint_bytes(sizes, training) / 1e9, STAGE_FILES * len(training.stages))


def _ridge_cost(config: Config, counts: KnownCounts) -> Cost:
    sessions = config.training.sessions
    share = 1.0 if sessions is None else len(sessions) / counts.sessions
    images = round((counts.images - counts.test_images) * share * (1.0 - config.training.heldout_fraction))
    found = ridge.Cost.of(images, counts.voxels, _specs(config.training.targets))
    return Cost(0, found.operations / RIDGE_FLOPS, found.device_bytes / 1e9, found.disk_bytes / 1e9, STAGE_FILES)


def _evaluation_cost(config: Config, counts: dict[int, KnownCounts]) -> Cost:
    evaluation, subject = config.evaluation, config.training.target_subject
    images = counts[subject].test_images if counts else config.phantom.num_shared
    images = min(images, evaluation.num_images or images)
    points = config_points(config)
    work = images * len(points) * evaluation.num_repeats
    if not counts:
        return Cost(work)
    repeats = evaluation.num_repeats / REPEATS
    guided, plain, decode = (repeats * _budget(path) / 1e3 for path in _SAMPLER)
    bundles = plan_bundles(points, {subject: range(images)}, evaluation.batch_size)
    left = [(b, len(b.image_ids), unit_steps(config_at(config, b.points[0]), b.points)) for b in bundles]
    hours = estimate(left, {cost_class(point): StepCost(guided, plain) for point in points}, 1).gpu_hours
    kept = min(images, images if evaluation.keep_pictures is None else evaluation.keep_pictures) * len(points)
    disk = DiskUse(images * len(points), kept, 0, evaluation.num_repeats, PICTURE_BYTES, 0.0)
    seconds = hours * SECONDS_PER_HOUR + decode * images * len(points)
    return Cost(work, seconds, _budget(_SAMPLER[0], "peak_gb"), disk.end_bytes / 1e9, disk.files)


_SAMPLER = ("sampler: guided step, 5 rows", "sampler: plain step, 5 rows", "sampler: decode 5 pictures")
_NOTES = """\
How it was counted: operations of each path at the published sizes, on a pretended GPU, at the rates that docs/gpu.md
assumes of an H100; another kind of GPU by its peak in bfloat16. No GPU has confirmed these hours:
`python -m benchmarks.gpu_check` measures the same paths on yours. A data set's subjects count as its first one.
Not counted: reading betas and writing shards (hours of a disk), judging pictures, validation, the queue.
Targets g cost at most what c does, and count as c."""
_OTHER_NETWORKS = "Hours, memory, disk and files are counted for the published networks and data sets only."


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
    console, planned, (memory_gb, slower) = make_console(), plan_study(study), GPUS[gpu]
    groups: dict[str, list[Stage]] = {}
    for stage in planned:
        groups.setdefault(stage.group, []).append(stage)
    costs = {group: cost_of(stages[0]).times(len(stages)) for group, stages in groups.items()}
    whole = reduce(Cost.__add__, costs.values())
    table = Table("stage", "how many", "done", "steps or pictures", f"{gpu} hours", "GPU memory", "disk", "files")
    for group, stages in groups.items():
        done = sum(is_done(study, stage) for stage in stages)
        table.add_row(group, str(len(stages)), str(done), *_cells(costs[group], slower))
    table.add_row("all", str(len(planned)), "", "", *_cells(whole, slower)[1:])
    console.print(table, soft_wrap=False)
    if not whole.seconds:
        console.print(_OTHER_NETWORKS)
        return
    span = duration(whole.seconds * slower / gpus)
    console.print(f"{span} with {gpus} {gpu} (--gpus), if all are at work all the time.")
    if whole.memory_gb > memory_gb:
        console.print(f"A stage wants {whole.memory_gb:.0f} GB, this GPU has {memory_gb}: it halves its batches.")
    console.print(_NOTES)


def _cells(cost: Cost, slower: float) -> list[str]:
    """Return the cells of a row: work, hours, memory, disk, files; a dash where nothing was counted."""
    if not cost.seconds:
        return [f"{cost.work:,}" if cost.work else "–", *"––––"]
    hours = cost.seconds * slower / SECONDS_PER_HOUR
    return [
        f"{cost.work:,}",
        f"{hours:,.1f}",
        f"{cost.memory_gb:.0f} GB",
        f"{cost.disk_gb:,.0f} GB",
        f"{cost.files:,}",
    ]
