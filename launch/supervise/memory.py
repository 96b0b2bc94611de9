"""How much memory a training needs on each GPU, and what to change where that is too much.

It is counted on the training's real modules at full size, without allocating them.

Weights, gradients and optimizer state follow from parameter counts: a layer whose columns are divided among the ranks
keeps float32 weights, gradients and two moments of its share (and a copy in half precision); DeepSpeed's parameters
depend on stage and precision. Activations are counted by running the real objective on the meta device and adding up
what autograd saves.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from nd_dist.config import Config, TrainingConfig
from nd_dist.errors import ConfigError
from nd_dist.models.decoder import Decoder
from nd_dist.schema import TargetSpec
from nd_dist.training.engine.sharded import shard_large_layers
from nd_dist.training.objective.objectives import Objective, StepInputs
from nd_dist.training.parameters import REDUCE_BUCKET
from nd_dist.training.ranks import GlobalRows
from nd_dist.training.ridge import Cost
from nd_dist.training.source import StageRequest, stage_request
from nd_dist.world import World

if TYPE_CHECKING:
    from shards.format.index import Index

HEADROOM = 1.1
"""Allocator fragments, libraries' workspaces: a guess."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a training.

    Args:
        deepspeed: Those that DeepSpeed holds.
        divided: Those of layers divided among the ranks (all of them, over all ranks).
        activation_values: Numbers that autograd saves for a rank's micro-batch.
    """

    deepspeed: int
    divided: int
    activation_values: int


def count(decoder: Decoder, training: TrainingConfig, rows: int, ranks: int) -> Counts:
    """Return the counts of a decoder on the meta device; its large layers are replaced.

    Args:
        decoder: On the meta device.
        training: Whether layers are divided, whether there is a teacher.
        rows: Rows of the global micro-batch.
        ranks: Ranks that share them.
    """
    meta, per_subject = torch.device("meta"), -(-rows // ranks // len(decoder.num_voxels))
    own = per_subject * len(decoder.num_voxels)
    activations = round(_activation_values(decoder, training, per_subject) * -(-rows // ranks) / own)
    layers = shard_large_layers(decoder, rows, World(), meta) if training.shard_layers else {}
    divided = sum(p.numel() for layer in layers.values() for p in layer.own.values())
    return Counts(sum(p.numel() for p in decoder.parameters()), divided, activations)


def _activation_values(decoder: Decoder, training: TrainingConfig, per_subject: int) -> int:
    """Return how many numbers autograd saves in a forward pass of equally many rows a subject, weights left out."""
    meta, total = torch.device("meta"), per_subject * len(decoder.num_voxels)
    voxels = {s: torch.empty(per_subject, num, device=meta) for s, num in decoder.num_voxels.items()}
    targets = {spec.name: torch.empty(total, *spec.shape, device=meta) for spec in decoder.targets}
    inputs = StepInputs(0, voxels, targets, np.arange(total))
    training = training.model_copy(update={"mixco_fraction": 0.0})
    objective = Objective(decoder, training, total_steps=2, seed=0, rows=GlobalRows(total))
    kept: dict[int, torch.Tensor] = {}  # ids stay unique as long as the tensors live
    weights = {id(parameter) for parameter in decoder.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor._base if tensor._base is not None else tensor) not in weights:
            kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(inputs, 1)
    return sum(tensor.numel() for tensor in kept.values())


def kept_bytes(counts: Counts, ranks: int, zero_stage: int, is_half: bool) -> float:
    """Return the bytes of weights, optimizer state and kept gradients per rank between steps."""
    divided = 16 * counts.divided / ranks  # their gradients keep their memory
    p, part = counts.deepspeed, counts.deepspeed / ranks
    weights = 2 if is_half else 4
    if zero_stage == 0:
        return divided + 12 * p
    if zero_stage == 3:
        return divided + (2 * weights + 12) * part + weights * REDUCE_BUCKET  # gradients keep their memory
    return divided + weights * p + 12 * part


def peak_bytes(counts: Counts, ranks: int, zero_stage: int, is_half: bool) -> float:
    """Return the bytes per rank when the optimizer steps or the backward pass begins, whichever is more."""
    width = 2 if is_half else 4
    p, part = counts.deepspeed, counts.deepspeed / ranks
    gradients = {0: width * p, 1: width * p, 2: width * part, 3: 0.0}[zero_stage]
    stepping = gradients + (4 * part if zero_stage else 0)  # ZeRO copies its part to float32
    copies = 2 * counts.divided / ranks if is_half else 0
    passing = width * counts.activation_values + gradients + copies
    return kept_bytes(counts, ranks, zero_stage, is_half) + max(stepping, passing)


def stage_counts(
    config: Config, num_voxels: Mapping[int, int], specs: Sequence[TargetSpec], ranks: int
) -> dict[int, Counts]:
    """Return the counts of each stage of a recipe.

    Args:
        config: The recipe.
        num_voxels: Subject -> number of voxels.
        specs: The targets that are trained.
        ranks: Ranks of the training.
    """
    counts: dict[int, Counts] = {}
    for stage in config.training.stages:
        request: StageRequest = stage_request(config, stage, ranks)
        with torch.device("meta"):
            decoder = Decoder(config.decoder, {s: num_voxels[s] for s in request.subjects}, specs, request.pictures)
        # buffers too: once transformers has loaded a model, its torch.linspace ignores the device
        counts[stage] = count(decoder.to("meta"), config.training, request.num_rows, ranks)
    return counts


def needed_bytes(counts: Mapping[int, Counts], training: TrainingConfig, ranks: int) -> dict[int, float]:
    """Return the bytes that each stage needs on a GPU, with some room."""
    is_half = training.dtype != "float32"
    return {stage: HEADROOM * peak_bytes(own, ranks, training.zero_stage, is_half) for stage, own in counts.items()}


def checkpoint_bytes(counts: Mapping[int, Counts], training: TrainingConfig) -> float:
    """Return the bytes that all stages leave on disk: checkpoints, the last model and the best one."""
    width, total = 4 if training.dtype == "float32" else 2, 0.0
    for own in counts.values():
        parameters = own.deepspeed + own.divided
        state = 12 * parameters + width * own.deepspeed  # float32 weights and two moments; DeepSpeed's own copy
        total += training.keep_checkpoints * state + 2 * 4 * parameters
    return total


def gpu_bytes() -> int:
    """Return the memory of this machine's smallest GPU, 0 where none is known."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return min((int(line) for line in answer.split() if line.isdigit()), default=0) * 2**20


def ridge_cost(config: Config, index: Index) -> str:
    """Return what a ridge regression takes, in words; images are counted by the index, before any is read.

    Raises:
        ConfigError: this machine's GPUs are too small.
    """
    training = config.training
    subject, specs = index.subjects[training.target_subject], index.target_specs
    share = 1.0 if training.sessions is None else min(1.0, len(training.sessions) / subject.sessions)
    num_images = round((subject.images - subject.test_images) * share * (1.0 - training.heldout_fraction))
    cost = Cost.of(num_images, subject.voxels, [spec for spec in specs if spec.name in training.targets])
    if 0 < (available := gpu_bytes()) < cost.device_bytes:
        raise ConfigError(
            "A ridge regression needs more memory than a GPU has.",
            expected=f"{cost.device_bytes / 1e9:.1f} GB",
            found=f"{available / 1e9:.1f} GB",
            todo="fit it on the CPU by hiding the GPUs (CUDA_VISIBLE_DEVICES=)",
        )
    return cost.describe()


def memory_note(needed: Mapping[int, float], available: int, config: Config, ranks: int) -> str:
    """Return what a training needs, in words.

    Args:
        needed: Stage -> bytes on each GPU, see ``needed_bytes``.
        available: Bytes of the smallest GPU; 0: unknown.
        config: The recipe.
        ranks: Ranks of the training.

    Raises:
        ConfigError: the GPUs are too small; it says what would lessen the need.
    """
    stage, most = max(needed.items(), key=lambda item: item[1])
    if not 0 < available < most:
        return ", ".join(f"stage {stage} needs {num / 1e9:.1f} GB on each GPU" for stage, num in needed.items())
    training, ways = config.training, [f"more ranks than {ranks}"]
    if config.decoder.heads == "single" and len(training.targets) > 1:
        ways = ["--all-targets (every target is a training of its own)", *ways]
    if training.dtype == "float32":
        ways.append("training.dtype=bfloat16")
    if training.zero_stage < 2 and ranks > 1:
        ways.append("training.zero_stage=2")
    ways.append("training.gradient_accumulation=2 with half of training.samples_per_subject")
    raise ConfigError(
        f"Stage {stage} needs more memory than a GPU has.",
        where=f"{ranks} ranks",
        expected=f"{most / 1e9:.1f} GB on each GPU (counted, with {HEADROOM - 1:.0%} room)",
        found=f"{available / 1e9:.1f} GB",
        todo=f"take {', or '.join(ways)}",
    )
