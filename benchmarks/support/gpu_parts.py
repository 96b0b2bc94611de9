"""What the parts of ``benchmarks.gpu_check`` share."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.support.networks import WIDTHS, Width
from benchmarks.support.samples import timed


@dataclass(frozen=True)
class Setting:
    """What a part is run with.

    Args:
        size: ``full`` (Stable Diffusion 1.4, h=4096) or ``toy``.
        device: ``cuda`` or ``cpu``.
        folder: An empty folder for whatever it writes.
    """

    size: str
    device: str
    folder: Path

    @property
    def is_full(self) -> bool:
        """Whether sizes are the published ones."""
        return self.size == "full"

    @property
    def width(self) -> Width:
        """Sizes of the frozen networks."""
        return WIDTHS["sd14" if self.is_full else "toy"]


def median_ms(run: Callable[[], torch.Tensor], device: str, rounds: int = 3) -> float:
    """Return the median milliseconds of a call after one that warms up."""
    run()
    return 1e3 * statistics.median(timed(run, device)[1].wall_s for _ in range(rounds))


def beside(measured_ms: float, predicted_ms: float) -> dict[str, float]:
    """Return a measured time beside the predicted one."""
    return {
        "ms": round(measured_ms, 2),
        "predicted_ms": round(predicted_ms, 2),
        "measured_to_predicted": round(measured_ms / predicted_ms, 2),
    }


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference of two tensors as a share of the wanted one's largest value."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())
