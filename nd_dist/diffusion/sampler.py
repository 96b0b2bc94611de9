"""The guided sampler: from decoded targets to pictures, a batch of (image, repeat) units at a time.

    z --noise--> x --T DDIM steps, the first int(T eta) of them guided--> x --VAE decoder--> picture

What one step predicts is in ``denoiser``. Every row is a unit of its own: its noise comes from its own seed and its
loss is its own, so a result depends on the batch by float rounding only. Rounding can be visible: where a value lies
within it of one of the method's thresholds (SAG's attention mask, the clamp of the guidance's pixels), another batch
may fall on the other side and move that one picture by some 1e-4 to 1e-2. On a CPU equal batches give equal bits.
Shape suffixes: B batch, T steps, G guided steps, L tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch

from nd_dist.config import SamplerConfig
from nd_dist.diffusion.attention_guidance import AttentionReader, middle_attention, reading_attention
from nd_dist.diffusion.denoiser import Conditions, Denoiser, Networks, NoisePrediction
from nd_dist.diffusion.finite import PICTURE, FiniteGuard
from nd_dist.diffusion.guidance import Guidance
from nd_dist.diffusion.memory import plan_chunks
from nd_dist.diffusion.noise import NoiseRequest, draw_noise
from nd_dist.diffusion.samples import SampleOptions, SampleResult, StepRecord
from nd_dist.diffusion.schedule import Step, StepPlan, plan_steps, read_schedule, signal_and_noise
from nd_dist.errors import DataError
from nd_dist.frozen.stable_diffusion import StableDiffusion
from nd_dist.schema import INITIAL, SEMANTIC

__all__ = ["GuidedSampler", "SampleOptions", "SampleResult", "StepRecord"]

_NO_OPTIONS = SampleOptions()


class GuidedSampler:
    """Reconstructs pictures from targets.

    Args:
        sd: A Stable Diffusion folder's networks; their dtype is the dtype of the run, latents stay float32 (or wider).
        guidance: The guidance term.
        config: Scales and switches of the method, memory and failure policy.
        empty_caption_1LD: The empty caption's tokens; none embeds "" with the model's own text encoder, once.

    Raises:
        CheckpointError: the model's scheduler is not supported, or SAG is on and the UNet has no middle attention.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        guidance: Guidance,
        config: SamplerConfig,
        empty_caption_1LD: torch.Tensor | None = None,
    ) -> None:
        self._sd, self._guidance, self._config = sd, guidance, config
        self._forward = sd.compiled(config.compile == "cuda-graphs") if config.compile else sd
        self._schedule = read_schedule(sd.scheduler_config)
        self._given_empty_caption = empty_caption_1LD
        self._chunks = plan_chunks(sd, config)
        networks = Networks(sd, self._forward, guidance)
        self._denoiser = Denoiser(networks, self._schedule.prediction, config, self._chunks.vae)
        self._reader = AttentionReader()
        if config.sag_scale > 0:
            middle_attention(sd.unet)

    @cached_property
    def _empty_caption(self) -> torch.Tensor:
        given = self._given_empty_caption
        return (self._sd.encode_text([""]) if given is None else given).to(self._sd.device)

    @property
    def latent_dtype(self) -> torch.dtype:
        """Dtype of latents, schedule and losses: float32, or float64 with float64 networks."""
        return torch.promote_types(self._sd.dtype, torch.float32)

    def plan(self, kappa: float | None = None, eta: float | None = None) -> StepPlan:
        """Return the steps of a run; none takes the configured kappa or eta, and kappa 0 guides no step."""
        kappa = self._config.kappa if kappa is None else kappa
        eta = self._config.eta if eta is None else eta
        return plan_steps(
            self._schedule,
            self._config.num_steps,
            self._config.strength,
            eta if kappa > 0 else 0.0,
            self._config.noise_timestep,
        )

    @torch.no_grad()
    def sample(
        self,
        c_BLD: torch.Tensor,
        z_BCHW: torch.Tensor,
        targets: Mapping[str, torch.Tensor],
        requests: Sequence[NoiseRequest],
        kappa: float | None = None,
        eta: float | None = None,
        options: SampleOptions = _NO_OPTIONS,
    ) -> SampleResult:
        """Return one picture per request.

        Args:
            c_BLD: Semantic targets, text tokens (B, L, D).
            z_BCHW: Initial targets, scaled latents (B, C, H, W).
            targets: Guidance targets by name, one row per request. Not looked at when nothing is guided.
            requests: The units (image, repeat), one per row: repeats of an image are rows of their own.
            kappa: Guidance scale; none takes the configured one. 0 turns guidance off.
            eta: Guided share of the steps; none takes the configured one. 0 turns guidance off.
            options: Given noise, intermediate pictures, an observer.

        Raises:
            DataError: shapes do not fit the model, a guidance target is missing, or nothing is requested.
            NonFiniteSample: a target, gradient, latent or picture is not finite (unless failures are reported).
            OutOfMemory: not even one sample fits.
        """
        self._check_shapes(c_BLD, z_BCHW, targets, requests)
        kappa = self._config.kappa if kappa is None else kappa
        plan = self.plan(kappa, eta)
        done, latents = options.resume or (0, None)
        steps = plan.steps[done:]
        guard = FiniteGuard(requests, self._config.on_non_finite)
        conditions = self._conditions(c_BLD, targets if any(step.is_guided for step in steps) else None, guard)
        noise = self._draw(requests) if options.noise_BCHW is None else options.noise_BCHW
        x = self.start(guard.check(f"target {INITIAL}", self._place(z_BCHW)), self._place(noise), plan)
        x = x if latents is None else self._place(latents)
        guard.settle()
        losses: list[torch.Tensor] = []
        pictures: list[torch.Tensor] = []
        has_sag = self._config.sag_scale > 0
        with reading_attention(self._sd.unet, self._reader) if has_sag else nullcontext() as reader:
            for step in steps:
                x, record = self._step(x, step, conditions, kappa, reader, guard)
                losses += [record.loss_B] if step.is_guided else []
                pictures += [self.decode(x)] if options.intermediates else []
                options.observe(record)
        guard.settle()
        return self._result(x, losses, pictures, guard)

    @property
    def guidance_targets(self) -> tuple[str, ...]:
        """Names of the targets that guided steps need."""
        return self._guidance.targets

    @staticmethod
    def start(z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Return z noised to the plan's level: sqrt(abar) z + sqrt(1 - abar) noise."""
        level = plan.noise_alpha_cumprod
        started: torch.Tensor = level**0.5 * z_BCHW + (1.0 - level) ** 0.5 * noise_BCHW
        return started

    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents, (B, 3, H, W) float32 in [0,1], on the CPU."""

        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            return ((self._forward.decode(latents_BCHW[rows]).float() / 2.0 + 0.5).clamp(0.0, 1.0).cpu(),)

        return self._chunks.decode.run(len(latents_BCHW), of_rows)[0]

    def _step(
        self,
        x: torch.Tensor,
        step: Step,
        conditions: Conditions,
        kappa: float,
        reader: AttentionReader | None,
        guard: FiniteGuard,
    ) -> tuple[torch.Tensor, StepRecord]:
        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            made = self._denoiser.predict(x[rows], step, conditions.rows(rows), kappa, reader)
            return made.eps_BCHW, made.gradient_BCHW, made.loss_B

        made = NoisePrediction(*self._chunks.for_step(step.is_guided).run(len(x), of_rows))
        signal, noise = signal_and_noise(step.alpha_cumprod)
        signal_next, noise_next = signal_and_noise(step.alpha_cumprod_next)
        eps = made.eps_BCHW
        if step.is_guided:
            eps = eps + noise * guard.check("gradient", made.gradient_BCHW, step.timestep)
        x_next = signal_next * ((x - noise * eps) / signal) + noise_next * eps
        x_next = guard.check("latent", x_next, step.timestep)
        return x_next, StepRecord(step, x_next, made.eps_BCHW, eps, made.loss_B)

    def _conditions(
        self, c_BLD: torch.Tensor, targets: Mapping[str, torch.Tensor] | None, guard: FiniteGuard
    ) -> Conditions:
        """Return captions and, where a step is guided, prepared targets on the device, all finite."""
        prepared: Mapping[str, torch.Tensor] = {}
        if targets is not None:
            placed = {name: self._place(values) for name, values in targets.items()}
            prepared = self._guidance.prepare(guard.check_all(placed))
        return Conditions(
            empty_BLD=self._empty_caption.expand(len(c_BLD), -1, -1),
            caption_BLD=guard.check(f"target {SEMANTIC}", c_BLD.to(self._sd.device)),
            prepared=guard.check_all(prepared, prefix="guidance weight of "),
        )

    def _result(
        self, x: torch.Tensor, losses: list[torch.Tensor], pictures: list[torch.Tensor], guard: FiniteGuard
    ) -> SampleResult:
        images = guard.check(PICTURE, self.decode(x))
        for failure in guard.failures:
            images[failure.row] = torch.nan
        return SampleResult(
            images_BCHW=images,
            latents_BCHW=x.cpu(),
            losses_GB=torch.stack(losses).cpu() if losses else torch.zeros((0, len(x)), dtype=x.dtype),
            intermediates_TBCHW=torch.stack(pictures) if pictures else images.new_zeros((0, *images.shape)),
            failures=guard.failures,
        )

    def _draw(self, requests: Sequence[NoiseRequest]) -> torch.Tensor:
        own, wanted = self._sd.device, torch.device(self._config.noise_device)
        device = own if own.type == wanted.type else wanted
        return draw_noise(requests, self._sd.latent_shape, self._config.noise, device)

    def _place(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._sd.device, self.latent_dtype)

    def _check_shapes(
        self,
        c_BLD: torch.Tensor,
        z_BCHW: torch.Tensor,
        targets: Mapping[str, torch.Tensor],
        requests: Sequence[NoiseRequest],
    ) -> None:
        num, width = len(requests), int(self._sd.unet.config.cross_attention_dim)
        if not requests:
            raise DataError("No reconstruction was requested.", expected="at least one (image, repeat)")
        if tuple(c_BLD.shape[::2]) != (num, width):
            raise _misfit(SEMANTIC, f"({num}, L, {width})", c_BLD)
        if tuple(z_BCHW.shape) != (num, *self._sd.latent_shape):
            raise _misfit(INITIAL, str((num, *self._sd.latent_shape)), z_BCHW)
        for name, values in targets.items():
            if len(values) != num:
                raise _misfit(name, f"({num}, ...)", values)


def _misfit(name: str, expected: str, found: torch.Tensor) -> DataError:
    return DataError(
        f"Target {name} does not fit the model.",
        expected=f"{expected}, one row per request",
        found=tuple(found.shape),
        todo="sample with the model that the targets were made with",
    )
