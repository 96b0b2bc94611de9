"""Everything of training that depends on the step alone: learning rate, beta1, contrastive phase and temperature.

Steps are *global* optimizer steps, so nothing here anneals faster on more ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

INITIAL_DIVISOR = 25.0
FINAL_DIVISOR = 1000.0
MOMENTUM_LOW, MOMENTUM_HIGH = 0.85, 0.95
FIXED_BETA1 = 0.9
ADAM_BETA2 = 0.999
MIXCO_TEMPERATURE = 0.006
SOFTCLIP_START, SOFTCLIP_END = 0.004, 0.0075


Schedule = Callable[[int], tuple[float, tuple[float, float]]]
"""Returns the learning rate and AdamW's betas of a 0-based optimizer step."""


@dataclass(frozen=True)
class OneCycle:
    """Learning rate and beta1 of a one-cycle schedule with cosine annealing.

    Args:
        total_steps: Optimizer steps of the stage.
        peak: Highest learning rate; it starts at peak/25 and ends at peak/25000.
        warmup_fraction: Share of the steps until the peak.
        cycle_momentum: beta1 .95 -> .85 -> .95 along the way; else 0.9.

    Source: Smith and Topin (2018), in the form of torch's OneCycleLR.
    """

    total_steps: int
    peak: float
    warmup_fraction: float
    cycle_momentum: bool

    def __call__(self, step: int) -> tuple[float, tuple[float, float]]:
        """Return the learning rate and AdamW's betas of a 0-based optimizer step."""
        return self.learning_rate(step), (self.beta1(step), ADAM_BETA2)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a 0-based optimizer step."""
        initial = self.peak / INITIAL_DIVISOR
        return self._between(step, initial, self.peak, initial / FINAL_DIVISOR)

    def beta1(self, step: int) -> float:
        """Return AdamW's beta1 of a 0-based optimizer step."""
        if not self.cycle_momentum:
            return FIXED_BETA1
        return self._between(step, MOMENTUM_HIGH, MOMENTUM_LOW, MOMENTUM_HIGH)

    def _between(self, step: int, start: float, middle: float, end: float) -> float:
        """Return the value at a step: start to middle in the warm-up, middle to end after it."""
        warm = self.warmup_fraction * self.total_steps - 1.0
        if warm > 0.0 and step <= warm:
            return _cosine(start, middle, step / warm)
        rest = self.total_steps - 1.0 - warm
        return _cosine(middle, end, min(1.0, (step - warm) / rest))


def _cosine(start: float, end: float, fraction: float) -> float:
    """Return the point at ``fraction`` of a half cosine from start to end."""
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class ContrastivePhase:
    """Which contrastive loss a step uses.

    Args:
        is_mixco: MixCo with BiMixCo, else SoftCLIP.
        temperature: Divides the cosine similarities.
    """

    is_mixco: bool
    temperature: float


def contrastive_phase(step: int, total_steps: int, mixco_fraction: float) -> ContrastivePhase:
    """Return the phase of a 0-based optimizer step: first MixCo, then SoftCLIP with a rising temperature.

    The released code moves the temperature once per epoch; here it moves with every step between the same ends.
    """
    mixco_steps = int(mixco_fraction * total_steps)
    if step < mixco_steps:
        return ContrastivePhase(True, MIXCO_TEMPERATURE)
    fraction = (step - mixco_steps) / max(1, total_steps - 1 - mixco_steps)
    return ContrastivePhase(False, softclip_temperature(fraction))


def softclip_temperature(fraction: float) -> float:
    """Return SoftCLIP's temperature at a fraction (0..1) of its phase.

    Source: MindEye's cosine_anneal from 0.004 to 0.0075.
    """
    return _cosine(SOFTCLIP_START, SOFTCLIP_END, min(1.0, max(0.0, fraction)))
