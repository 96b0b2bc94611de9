"""The budget of GPU paths: what each may cost, counted on a pretended GPU, and what that predicts for a real one.

The table is ``benchmarks/gpu_budget.json``: docs/gpu.md prints it, ``tests/fake_gpu`` holds every path to it, and
``benchmarks.gpu_check`` puts measured times beside its predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).parents[1] / "gpu_budget.json"


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches in practice (H100): assumptions, not measurements.

    Args:
        flops: Dtype -> operations per second; float32 in TF32.
        bytes_s: Memory traffic.
        kernel_s: A kernel that has next to nothing to do.
        launch_s: What the host takes to launch one operation from Python.
    """

    flops: Mapping[str, float]
    bytes_s: float = 2.4e12
    kernel_s: float = 2e-6
    launch_s: float = 8e-6

    def seconds(self, flops: float, dtype: str, moved_bytes: float) -> float:
        """Return the least time of one operation."""
        return max(flops / self.flops.get(dtype, self.flops["float32"]), moved_bytes / self.bytes_s, self.kernel_s)


H100 = Rates({"bfloat16": 480e12, "float16": 480e12, "float32": 210e12, "float64": 30e12})


@dataclass(frozen=True)
class Cost:
    """What one path costs.

    Args:
        kernels: Operations on the GPU.
        waits: How often the host waits for the GPU.
        to_device_mb, to_host_mb: Megabytes between host and GPU.
        peak_gb: Most memory alive at a time, weights included, workspaces not.
        gpu_ms: Time that the operations need on an H100 at the assumed rates.
    """

    kernels: int
    waits: int
    to_device_mb: float
    to_host_mb: float
    peak_gb: float
    gpu_ms: float

    @property
    def predicted_ms(self) -> float:
        """What bounds the path: the GPU's work, or launching it."""
        return max(self.gpu_ms, 1e3 * self.kernels * H100.launch_s)


def read_budget() -> dict[str, Cost]:
    """Return path -> what it may cost."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    return {path: Cost(**cost) for path, cost in content["paths"].items()}


def write_budget(costs: Mapping[str, Cost]) -> None:
    """Write the table."""
    content = {"torch": torch.__version__, "paths": {path: asdict(cost) for path, cost in costs.items()}}
    TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table_lines(costs: Mapping[str, Cost]) -> list[str]:
    """Return the table as Markdown."""
    head = "| path | kernels | host waits | MB to GPU | MB to host | peak GB | predicted ms (GPU; launches) |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for path, cost in costs.items():
        launch_ms = 1e3 * cost.kernels * H100.launch_s
        lines.append(
            f"| {path} | {cost.kernels:,} | {cost.waits} | {cost.to_device_mb:,.1f} | {cost.to_host_mb:,.1f} | "
            f"{cost.peak_gb:.1f} | {max(cost.gpu_ms, launch_ms):,.0f} ({cost.gpu_ms:,.0f}; {launch_ms:,.0f}) |"
        )
    return lines
