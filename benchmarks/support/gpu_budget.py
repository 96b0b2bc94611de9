"""The budget of GPU paths: what each may cost, counted on a pretended GPU, and what that predicts for a real one.

The table is ``launch/study/gpu_budget.json``: docs/gpu.md prints it, ``tests/fake_gpu`` holds every path to it, and
``benchmarks.gpu_check`` puts measured times beside its predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from launch.study.costs import BUDGET


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


def kernel_s(
    func: Any, call: tuple[Any, Any], out: Any, given: Sequence[torch.Tensor], fresh: Sequence[torch.Tensor]
) -> float:
    """Return the least seconds of one operation on an H100.

    Args:
        func: torch's operation.
        call: Its arguments, positional and by name.
        out: Its result.
        given: Tensors among its arguments.
        fresh: Tensors that it made.
    """
    args, kwargs = call
    count = flop_registry.get(func._overloadpacket)
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
    dtype = str((fresh or given)[0].dtype).removeprefix("torch.")
    return H100.seconds(flops, dtype, sum(tensor.numel() * tensor.element_size() for tensor in (*given, *fresh)))


class Roofline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels, and the least time that they need, of whatever runs on the meta device inside of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels, self.gpu_s = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it; a view is none."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([t for t in tree_leaves(part) if isinstance(t, torch.Tensor)] for part in ((args, kwargs), out))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        if (fresh or func._schema.is_mutable) and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.kernels += 1
            self.gpu_s += kernel_s(func, (args, kwargs), out, given, fresh)
        return out


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
    content = json.loads(BUDGET.read_text(encoding="utf-8"))
    return {path: Cost(**cost) for path, cost in content["paths"].items()}


def write_budget(costs: Mapping[str, Cost]) -> None:
    """Write the table."""
    content = {"torch": torch.__version__, "paths": {path: asdict(cost) for path, cost in costs.items()}}
    BUDGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
