"""The published procedure, plainly: one sample at a time, one formula after the other, autograd through everything.

Written from the method's formulas, with diffusers' own DDIM step; shares no code with the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Reference:
    sd: Any
    clip: Any
    scheduler_config: Mapping[str, Any]
    kappa: float
    eta: float
    cfg: float = 7.5
    sag: float = 0.75
    x0_form: str = "official"
    noise_timestep: str = "official"
    unet_gradient: bool = True
    layer_scale: tuple[float, ...] = (1.5, 1.2, 1.0, 1.0, 1.0, 1.0)
    num_steps: int = 50
    strength: float = 0.75
    antialias: bool = False
    trace: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def run(
        self, c: torch.Tensor, empty: torch.Tensor, z: torch.Tensor, noise: torch.Tensor, targets: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return picture (1, 3, H, W) in [0,1] and final latent of one sample; ``trace`` keeps what led there."""
        keys = {
            key: value for key, value in self.scheduler_config.items() if key not in ("_class_name", "skip_prk_steps")
        }
        scheduler = DDIMScheduler(**keys)
        scheduler.set_timesteps(self.num_steps)
        num_run = int(self.num_steps * self.strength)
        timesteps = scheduler.timesteps[self.num_steps - num_run :]
        start = {"official": num_run / self.num_steps * 1000, "first_step": timesteps[0], "last": 999}
        first = int(start[self.noise_timestep])
        level = scheduler.alphas_cumprod[first].to(z.dtype)
        x = level.sqrt() * z + (1 - level).sqrt() * noise
        self.trace.update(z_t=[x], timesteps=[timesteps])
        for index, t in enumerate(timesteps):
            abar = float(scheduler.alphas_cumprod[t])
            eps_u, probabilities = self._eps(x, t, empty, abar)
            eps = eps_u + self.cfg * (self._eps(x, t, c, abar)[0] - eps_u)
            if self.sag:
                eps = eps + self.sag * (
                    eps_u - self._eps(self._degrade(x, eps_u, probabilities, abar), t, empty, abar)[0]
                )
            if self.kappa and index < int(num_run * self.eta):
                gradient, loss = self._gradient(x, t, c, abar, targets)
                self._keep(eps_before_guidance=eps, guidance_loss=loss[None])
                eps = eps + self.kappa * (1 - abar) ** 0.5 * gradient
                self._keep(eps_after_guidance=eps)
            if scheduler.config.prediction_type == "v_prediction":
                output = (eps - (1 - abar) ** 0.5 * x) / abar**0.5
            else:
                output = eps
            x = scheduler.step(output, t, x).prev_sample
            self._keep(latents=x, eps_used=eps)
        return (self._decode(x) / 2 + 0.5).clamp(0, 1), x

    def _keep(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.trace.setdefault(name, []).append(value.detach())

    def _eps(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, abar: float) -> tuple[torch.Tensor, Any]:
        attention = self.sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        seen: list[torch.Tensor] = []
        handle = attention.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        output = self.sd.unet(x, t, encoder_hidden_states=tokens.to(x.dtype)).sample
        handle.remove()
        heads = [part(seen[0]).chunk(attention.heads, dim=-1) for part in (attention.to_q, attention.to_k)]
        probabilities = [(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) for q, k in zip(*heads, strict=True)]
        if self.scheduler_config.get("prediction_type") == "v_prediction":
            output = abar**0.5 * output + (1 - abar) ** 0.5 * x
        return output, sum(probabilities) / attention.heads

    def _degrade(self, x: torch.Tensor, eps: torch.Tensor, probabilities: torch.Tensor, abar: float) -> torch.Tensor:
        side = round(probabilities.shape[-1] ** 0.5)
        mask = (probabilities.sum(dim=1) > 1.0).reshape(1, 1, side, side)
        mask = mask.repeat_interleave(x.shape[2] // side, 2).repeat_interleave(x.shape[3] // side, 3).to(x.dtype)
        clean = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        window = torch.tensor([[-(i * i + j * j) / 2 for j in range(-4, 5)] for i in range(-4, 5)]).exp().to(x.dtype)
        window = window / window.sum()
        padded = F.pad(clean, (4, 4, 4, 4), mode="reflect")
        blurred = sum(
            window[i, j] * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(9) for j in range(9)
        )
        return abar**0.5 * (blurred * mask + clean * (1 - mask)) + (1 - abar) ** 0.5 * eps

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.sd.vae.decode(x / 0.18215).sample
        return pixels

    def _gradient(
        self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor, abar: float, targets: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_(True)
        eps = self._eps(leaf, t, c, abar)[0]
        eps = eps if self.unet_gradient else eps.detach()
        b = 1 - abar
        clean = (leaf - (b if self.x0_form == "official" else b**0.5) * eps) / abar**0.5
        image = self._decode(b**0.5 * clean + (1 - b**0.5) * leaf)
        pixels = ((image + 1) / 2).clamp(0, 1)
        size = self.clip.image_size
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=self.antialias)
        inputs = (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]
        taps: list[torch.Tensor] = []
        encoder = getattr(self.clip.tower, "vision_model", self.clip.tower).encoder
        handles = [
            layer.mlp.register_forward_hook(lambda _module, _args, output: taps.append(output))
            for layer in encoder.layers
        ]
        self.clip.tower(pixel_values=inputs)
        for handle in handles:
            handle.remove()
        inverse = [1 / target.norm() for target in targets.values()]
        loss = sum(
            a * share / sum(inverse) * (tap - target).square().mean()
            for a, share, tap, target in zip(self.layer_scale, inverse, taps, targets.values(), strict=True)
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss
