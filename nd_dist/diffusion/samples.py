"""What a sampling call may ask for, and what it gives back. Values only.

Shape suffixes: B batch, T steps, G guided steps, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from nd_dist.diffusion.finite import SampleFailure
from nd_dist.diffusion.schedule import Step


@dataclass(frozen=True)
class StepRecord:
    """What happened in one step, for observers.

    Args:
        step: Timestep and noise levels.
        latents_BCHW: After the step.
        eps_before_BCHW: Noise prediction after classifier-free and self-attention guidance.
        eps_after_BCHW: The same plus the guidance gradient.
        loss_B: Guidance loss of each sample (zero in unguided steps).
    """

    step: Step
    latents_BCHW: torch.Tensor
    eps_before_BCHW: torch.Tensor
    eps_after_BCHW: torch.Tensor
    loss_B: torch.Tensor


def _ignore(_record: StepRecord) -> None:
    """Observe nothing."""


@dataclass(frozen=True)
class SampleOptions:
    """What a call may ask for besides pictures.

    Args:
        noise_BCHW: Start noise to use instead of the units' own draws.
        intermediates: Also decode the latents after every step (as the released code does, at 40 % of its cost).
        observe: Called after every step.
        resume: (steps done, latents after them): go on from there instead of from noise, as a run does that shares
            its first steps with another of the same kappa.
    """

    noise_BCHW: torch.Tensor | None = None
    intermediates: bool = False
    observe: Callable[[StepRecord], None] = field(default=_ignore)
    resume: tuple[int, torch.Tensor] | None = None


@dataclass(frozen=True)
class SampleResult:
    """Pictures and what led to them; all on the CPU.

    Args:
        images_BCHW: Pictures (B, 3, H, W), float32 in [0,1]; NaN in rows that failed.
        latents_BCHW: Final scaled latents.
        losses_GB: Guidance loss of each guided step and sample.
        intermediates_TBCHW: Pictures after every step; no steps unless asked for.
        failures: Rows that went wrong and why; empty unless failures are reported instead of stopping the run.
    """

    images_BCHW: torch.Tensor
    latents_BCHW: torch.Tensor
    losses_GB: torch.Tensor
    intermediates_TBCHW: torch.Tensor
    failures: tuple[SampleFailure, ...]


def joined(first: SampleResult, later: SampleResult, steps: tuple[Step, ...], done: int) -> SampleResult:
    """Return the whole result of a run that went on from the latents of another one.

    Args:
        first: The run whose first steps are shared; all of these were guided.
        later: What the run gave that went on.
        steps: All steps of that run.
        done: How many of them are shared.
    """
    before = [failure for failure in first.failures if failure.happened_before(steps[done].timestep)]
    failures = {failure.row: failure for failure in (*later.failures, *before)}
    images = later.images_BCHW.clone()
    images[list(failures)] = torch.nan
    return replace(
        later,
        images_BCHW=images,
        losses_GB=torch.cat([first.losses_GB[:done], later.losses_GB]),
        intermediates_TBCHW=torch.cat([first.intermediates_TBCHW[:done], later.intermediates_TBCHW]),
        failures=tuple(failures[row] for row in sorted(failures)),
    )
