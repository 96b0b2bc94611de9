"""A model of the step time on many GPUs: where it stops scaling, and what would lift it.

    python -m benchmarks.training_scaling

Counted: kernels, floating-point operations, memory traffic and parameters of the real modules at published size.
Assumed (no GPU was at hand): the rates of ``benchmarks.support.gpu_budget`` and in ``Machine``. The global batch grows
with the ranks (``rows_per_rank`` each), because 42 rows cannot keep 64 GPUs busy; whether a larger batch trains as
well is another question, which this does not answer.

A step = forward and backward (what the GPU needs for each kernel, or what the host needs to launch them, whichever is
more) + optimizer + communication. Communication is not overlapped with anything here, so times
are upper bounds. Two ways are compared: every gradient averaged over all ranks, and large layers divided by columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.support.gpu_budget import H100, Roofline
from benchmarks.training_memory import TRAININGS, full_size
from nd_dist.config import TrainingConfig
from nd_dist.models.decoder import Decoder
from nd_dist.training.engine.sharded import OwnColumns, pays, shard_large_layers
from nd_dist.training.objective.objectives import Objective, StepInputs
from nd_dist.training.ranks import GlobalRows
from nd_dist.world import World

ROWS_PER_RANK = (7, 42)
BYTES = 2  # of a gradient or activation on the wire: bfloat16


@dataclass(frozen=True)
class Machine:
    """What a GPU and its link do.

    Args:
        memory_bytes_s: Bytes per second to and from memory.
        link_bytes_s: Bytes per second to other hosts (400 Gb/s).
        latency_s: Seconds that one collective call takes however small.
    """

    memory_bytes_s: float = 2.5e12
    link_bytes_s: float = 50e9
    latency_s: float = 30e-6


@dataclass(frozen=True)
class Layer:
    """A layer divided by columns.

    Args:
        inputs, outputs: Its widths.
        is_first: Whether its input is data (no gradient goes back).
        share: Share of the batch's rows that it sees (a voxel encoder: those of one subject).
    """

    inputs: int
    outputs: int
    is_first: bool
    share: float

    @property
    def numel(self) -> int:
        """Weights."""
        return self.inputs * self.outputs

    def wire_values(self, rows: int, ranks: int) -> float:
        """Return the numbers that one rank sends in a step: inputs of all ranks, its outputs there and back."""
        seen = rows * self.share
        back = 0 if self.is_first else 4 * seen * self.inputs  # an all-reduce in float32: twice, twice as wide
        return seen * self.inputs + 2 * seen * self.outputs / ranks + back


class Pass(NamedTuple):
    """A forward and backward pass: seconds that the GPU needs, and that the host needs to launch its kernels."""

    gpu_s: float
    launch_s: float


@dataclass(frozen=True)
class Work:
    """What a training step consists of.

    Args:
        passes: Rows of a GPU -> their forward and backward pass.
        replicated: Parameters whose gradients DeepSpeed averages.
        layers: The layers that can be divided.
    """

    passes: Mapping[int, Pass]
    replicated: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step."""

    compute: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.optimizer + self.communication


def step_time(work: Work, machine: Machine, ranks: int, rows_per_rank: int, is_divided: bool) -> StepTime:
    """Return the time of one step with ZeRO 1 (optimizer state over all ranks)."""
    rows = ranks * rows_per_rank
    chosen = [y for y in work.layers if is_divided and pays(y.inputs, y.outputs, rows * y.share)]
    everything = work.replicated + sum(layer.numel for layer in work.layers)
    averaged = everything - sum(layer.numel for layer in chosen)
    # ZeRO 1: gradients there, new weights back; either is one pass around the ring
    wire = 2 * averaged * (ranks - 1) / ranks * BYTES
    calls = 4
    wire += sum(layer.wire_values(rows, ranks) for layer in chosen) * BYTES
    calls += 4 * len(chosen)
    optimizer_bytes = 28 * everything / ranks  # read weight, gradient, two moments; write three
    return StepTime(
        compute=max(work.passes[rows_per_rank]),
        optimizer=optimizer_bytes / machine.memory_bytes_s,
        communication=0.0 if ranks == 1 else wire / machine.link_bytes_s + calls * machine.latency_s,
    )


def work_of(decoder: Decoder, rows: int) -> Work:
    """Return the work of a decoder on the meta device; its large layers are replaced.

    Args:
        decoder: On the meta device.
        rows: Rows of the published batch; a layer that is not divided then never is.
    """
    passes = {rows_per_rank: _pass(decoder, rows_per_rank) for rows_per_rank in ROWS_PER_RANK}
    subjects = len(decoder.num_voxels)
    chosen = shard_large_layers(decoder, rows, World(), torch.device("meta"))
    layers = tuple(_layer(name, layer, subjects) for name, layer in chosen.items())
    return Work(passes, sum(p.numel() for p in decoder.parameters()), layers)


def _layer(name: str, layer: OwnColumns, subjects: int) -> Layer:
    """Return the widths of a divided layer."""
    outputs, inputs = layer.own["weight"].shape
    is_voxels = name.startswith("voxels.")
    return Layer(inputs, outputs, is_voxels, 1 / subjects if is_voxels else 1.0)


def _pass(decoder: Decoder, rows: int) -> Pass:
    """Return a forward and backward pass in bfloat16, counted on the meta device."""
    per_subject, meta = rows // len(decoder.num_voxels), torch.device("meta")
    decoder = copy.deepcopy(decoder).to(torch.bfloat16)
    voxels = {
        s: torch.empty(per_subject, count, device=meta, dtype=torch.bfloat16)
        for s, count in decoder.num_voxels.items()
    }
    targets = {spec.name: torch.empty(rows, *spec.shape, device=meta) for spec in decoder.targets}
    inputs = StepInputs(0, voxels, targets, np.arange(rows))
    objective = Objective(decoder, TrainingConfig(mixco_fraction=0.0), total_steps=2, seed=0, rows=GlobalRows(rows))
    with Roofline() as counter:
        objective(inputs, 1)[0].backward()
    return Pass(counter.gpu_s, counter.kernels * H100.launch_s)


def main() -> None:
    """Print step times and efficiencies at h=4096."""
    machine = Machine()
    print(f"{machine}")
    print("training | rows/GPU | GPUs | averaged: ms, efficiency | divided: ms, efficiency | compute, optimizer, wire")
    for name, (targets, heads) in TRAININGS.items():
        work = work_of(full_size(targets, heads, 4096), 42)
        numel = sum(layer.numel for layer in work.layers)
        print(f"# {name}: {work.replicated / 1e6:.0f} + {numel / 1e6:.0f} M parameters")
        for rows, (gpu_s, launch_s) in work.passes.items():
            print(f"# {rows} rows: GPU {gpu_s * 1e3:.1f} ms, launches {launch_s * 1e3:.1f} ms")
            alone = step_time(work, machine, 1, rows, True).total
            for ranks in (8, 64, 512):
                averaged, divided = (step_time(work, machine, ranks, rows, way) for way in (False, True))
                parts = (
                    f"{divided.compute * 1e3:.1f}, {divided.optimizer * 1e3:.1f}, {divided.communication * 1e3:.1f}"
                )
                print(
                    f"{name} | {rows} | {ranks} | {averaged.total * 1e3:.1f}, {alone / averaged.total:.0%} | "
                    f"{divided.total * 1e3:.1f}, {alone / divided.total:.0%} | {parts}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
