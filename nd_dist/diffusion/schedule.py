"""Which timesteps are run, which of them are guided, and the noise levels there. Pure: numbers in, numbers out.

Symbols: N steps of the full schedule, T steps that are run, abar the cumulative product of 1 - beta, b = 1 - abar.
Source: DDIM (Song et al. 2021, eq. 12 with its eta = 0); Stable Diffusion's schedule (scaled-linear beta, leading
spacing); NeuralDiffuser, section III-C (strength, guided share eta).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nd_dist.errors import CheckpointError, ConfigError

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of a scheduler folder.

    Args:
        alphas_cumprod: abar of timesteps 0..num-1, float32 (the released code keeps float32 in any precision).
        final_alpha_cumprod: abar "before" timestep 0.
        steps_offset: Added to every timestep of the leading spacing.
        prediction: What the UNet puts out.
    """

    alphas_cumprod: torch.Tensor
    final_alpha_cumprod: float
    steps_offset: int
    prediction: Prediction

    @property
    def num_timesteps(self) -> int:
        """Timesteps that the model was trained on (1000)."""
        return len(self.alphas_cumprod)

    def alpha_cumprod(self, timestep: int) -> float:
        """Return abar of a timestep; of a negative one, the final abar."""
        return float(self.alphas_cumprod[timestep]) if timestep >= 0 else self.final_alpha_cumprod


DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Samplers of networks that were trained for them and no other."""


def read_schedule(scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the noise levels that a scheduler configuration describes (DDIM's or PNDM's keys).

    Raises:
        CheckpointError: the configuration asks for something that this sampler does not do (the key is named).
    """
    refused = {
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
        "timestep_spacing": "leading",
    }
    # PNDM's configurations have no clip_sample, DDIM's default is true: only an absent key of another class is off.
    name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    if name in DISTILLED:  # its few large steps are no DDIM, and guidance is built in
        _require("_class_name", name, ("DDIMScheduler", "PNDMScheduler"))
    ddim = name == "DDIMScheduler"
    for key, allowed in refused.items():
        default = True if key == "clip_sample" and ddim else allowed
        _require(key, scheduler_config.get(key, default), (allowed,))
    prediction = scheduler_config.get("prediction_type", "epsilon")
    _require("prediction_type", prediction, ("epsilon", "v_prediction"))
    alphas_cumprod = torch.cumprod(1.0 - _betas(scheduler_config), dim=0)
    to_one = bool(scheduler_config.get("set_alpha_to_one", True))
    return NoiseSchedule(
        alphas_cumprod=alphas_cumprod,
        final_alpha_cumprod=1.0 if to_one else float(alphas_cumprod[0]),
        steps_offset=int(scheduler_config.get("steps_offset", 0)),
        prediction=prediction,
    )


def _betas(config: Mapping[str, Any]) -> torch.Tensor:
    kind = config.get("beta_schedule", "linear")
    _require("beta_schedule", kind, ("scaled_linear", "linear"))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    count = int(config.get("num_train_timesteps", 1000))
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2


def _require(key: str, found: object, allowed: tuple[object, ...]) -> None:
    if found not in allowed:
        raise CheckpointError(
            "The model's scheduler asks for something that this sampler does not do.",
            where=f"scheduler/scheduler_config.json, key {key}",
            expected=" or ".join(map(repr, allowed)),
            found=repr(found),
        )


def signal_and_noise(alpha_cumprod: float) -> tuple[float, float]:
    """Return sqrt(abar) and sqrt(1 - abar), both rounded to float32 as the released code does in any precision."""
    level = torch.tensor(alpha_cumprod, dtype=torch.float32)
    return float(level.sqrt()), float((1.0 - level).sqrt())


@dataclass(frozen=True)
class Step:
    """One denoising step.

    Args:
        index: 0-based, in the order of running.
        timestep: 0..999.
        alpha_cumprod: abar at ``timestep``.
        alpha_cumprod_next: abar that the step goes to.
        is_guided: Whether the guidance gradient is added.
    """

    index: int
    timestep: int
    alpha_cumprod: float
    alpha_cumprod_next: float
    is_guided: bool


@dataclass(frozen=True)
class StepPlan:
    """The denoising steps of a run, and the noise level that it starts from.

    Args:
        steps: In the order of running (timesteps fall).
        noise_timestep: The timestep that z is noised to.
        noise_alpha_cumprod: abar there.
    """

    steps: tuple[Step, ...]
    noise_timestep: int
    noise_alpha_cumprod: float


def num_guided(num_run: int, eta: float) -> int:
    """Return how many of the steps that are run are guided: int(T eta), counted from the first."""
    return int(num_run * eta)


def plan_steps(
    schedule: NoiseSchedule, num_steps: int, strength: float, eta: float, noise_timestep: str = "official"
) -> StepPlan:
    """Return the steps of a run.

    Args:
        schedule: Noise levels.
        num_steps: Steps N of the full schedule.
        strength: Share of it that is run; the last T = int(strength N) steps are (at least one).
        eta: Share of the T steps that is guided, the first int(T eta).
        noise_timestep: ``official``: int(T / N x 1000), some steps above the first timestep (at most the last of the
            schedule); ``first_step``: the first timestep.

    Raises:
        ConfigError: more steps than the model has timesteps.
    """
    stride = schedule.num_timesteps // num_steps if num_steps else 0
    full = [index * stride + schedule.steps_offset for index in reversed(range(num_steps))]
    if stride < 1 or full[0] >= schedule.num_timesteps:
        raise ConfigError(
            "The model has too few timesteps for sampler.num_steps.",
            expected=f"fewer than {schedule.num_timesteps} steps",
            found=num_steps,
        )
    num_run = max(1, int(num_steps * strength))
    guided = num_guided(num_run, eta)
    steps = tuple(
        Step(
            index=index,
            timestep=timestep,
            alpha_cumprod=schedule.alpha_cumprod(timestep),
            alpha_cumprod_next=schedule.alpha_cumprod(timestep - stride),
            is_guided=index < guided,
        )
        for index, timestep in enumerate(full[num_steps - num_run :])
    )
    official = min(schedule.num_timesteps - 1, int(num_run / num_steps * schedule.num_timesteps))
    start = official if noise_timestep == "official" else steps[0].timestep
    return StepPlan(steps=steps, noise_timestep=start, noise_alpha_cumprod=schedule.alpha_cumprod(start))
