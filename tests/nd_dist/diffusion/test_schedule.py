from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from nd_dist.diffusion.schedule import NoiseSchedule, num_guided, plan_steps, read_schedule, signal_and_noise
from nd_dist.errors import CheckpointError, ConfigError
from tests.nd_dist.frozen.toy_folders import SCHEDULER


@pytest.fixture
def schedule() -> NoiseSchedule:
    return read_schedule(SCHEDULER)


def diffusers_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**{key: SCHEDULER[key] for key in SCHEDULER if key not in ("_class_name", "skip_prk_steps")})


def test_noise_levels_are_bit_equal_to_diffusers(schedule: NoiseSchedule) -> None:
    assert torch.equal(schedule.alphas_cumprod, diffusers_scheduler().alphas_cumprod)
    assert schedule.final_alpha_cumprod == float(schedule.alphas_cumprod[0])


def test_the_published_run_has_37_steps_from_721_to_1_and_starts_at_740(schedule: NoiseSchedule) -> None:
    plan = plan_steps(schedule, num_steps=50, strength=0.75, eta=0.2)
    assert [step.timestep for step in plan.steps] == list(range(721, 0, -20))
    assert len(plan.steps) == 37
    assert plan.noise_timestep == 740
    assert [step.timestep for step in plan.steps if step.is_guided] == [721, 701, 681, 661, 641, 621, 601]
    assert plan.steps[-1].alpha_cumprod_next == schedule.final_alpha_cumprod


@pytest.mark.parametrize("num_steps", [7, 20, 50, 100, 333])
def test_timesteps_are_those_of_diffusers(schedule: NoiseSchedule, num_steps: int) -> None:
    scheduler = diffusers_scheduler()
    scheduler.set_timesteps(num_steps)
    plan = plan_steps(schedule, num_steps, strength=1.0, eta=0.0)
    assert [step.timestep for step in plan.steps] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("eta", "guided"), [(0, 0), (0.05, 1), (0.1, 3), (0.2, 7), (0.3, 11), (0.5, 18), (0.7, 25), (0.8, 29), (1, 37)]
)
def test_eta_guides_the_first_int_of_37_eta_steps(schedule: NoiseSchedule, eta: float, guided: int) -> None:
    assert num_guided(37, eta) == guided
    steps = plan_steps(schedule, 50, 0.75, eta).steps
    assert [step.is_guided for step in steps] == [True] * guided + [False] * (37 - guided)


def test_the_noise_may_start_at_the_first_step_instead(schedule: NoiseSchedule) -> None:
    assert plan_steps(schedule, 50, 0.75, 0.2, noise_timestep="first_step").noise_timestep == 721


def test_strength_one_starts_at_the_last_timestep_instead_of_behind_it(schedule: NoiseSchedule) -> None:
    plan = plan_steps(schedule, 50, 1.0, 0.2)
    assert plan.noise_timestep == 999
    assert plan.noise_alpha_cumprod == float(schedule.alphas_cumprod[999])


def test_a_tiny_strength_still_runs_one_step(schedule: NoiseSchedule) -> None:
    assert len(plan_steps(schedule, 50, 0.001, 1.0).steps) == 1


def test_more_steps_than_timesteps_are_refused(schedule: NoiseSchedule) -> None:
    for num_steps in (1000, 2000):
        with pytest.raises(ConfigError, match="num_steps"):
            plan_steps(schedule, num_steps, 0.75, 0.2)


def test_levels_are_rounded_to_float32_as_released() -> None:
    signal, noise = signal_and_noise(0.3)
    level = torch.tensor(0.3)
    assert (signal, noise) == (float(level**0.5), float((1 - level) ** 0.5))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "sample"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "trailing"),
        ("rescale_betas_zero_snr", True),
        ("clip_sample", True),
        ("thresholding", True),
        ("_class_name", "LCMScheduler"),
    ],
)
def test_what_the_sampler_does_not_do_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        read_schedule({**SCHEDULER, key: value})
    assert repr(value) in caught.value.found


def test_an_absent_clip_sample_counts_as_that_class_s_default() -> None:
    bare = {key: value for key, value in SCHEDULER.items() if key != "clip_sample"}
    read_schedule(bare)
    with pytest.raises(CheckpointError, match="clip_sample"):
        read_schedule({**bare, "_class_name": "DDIMScheduler"})


def test_a_linear_schedule_and_v_prediction_are_read_from_the_folder() -> None:
    config = {**SCHEDULER, "beta_schedule": "linear", "prediction_type": "v_prediction", "set_alpha_to_one": True}
    schedule = read_schedule(config)
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    assert torch.equal(schedule.alphas_cumprod, reference.alphas_cumprod)
    assert schedule.prediction == "v_prediction"
    assert schedule.alpha_cumprod(-19) == 1.0
