"""The work of the published sampler, plainly: what the guided sampler's speed is compared with.

One sample at a time; caption and empty caption in one UNet pass of two rows; a further pass for self-attention
guidance; the UNet evaluated again, with gradient, for the guidance, and one backward pass through UNet, VAE and CLIP;
the latents decoded after every step, whether anybody looks at them or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nd_dist.config import SamplerConfig
from nd_dist.diffusion.attention_guidance import blur_window, degrade, reading_attention
from nd_dist.diffusion.guidance import Guidance, ImageEstimate
from nd_dist.diffusion.schedule import Step, plan_steps, read_schedule, signal_and_noise
from nd_dist.frozen.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class PublishedSampler:
    """The published procedure for one sample at a time.

    Args:
        sd: UNet and VAE.
        guidance: The guidance term.
        config: Scales; switches are the published ones.
        empty_1LD: The empty caption's tokens.
    """

    sd: StableDiffusion
    guidance: Guidance
    config: SamplerConfig
    empty_1LD: torch.Tensor

    @torch.no_grad()
    def sample(
        self, c_1LD: torch.Tensor, z_1CHW: torch.Tensor, noise_1CHW: torch.Tensor, targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the picture (1, 3, H, W) in [0,1] of one sample."""
        config = self.config
        plan = plan_steps(read_schedule(self.sd.scheduler_config), config.num_steps, config.strength, config.eta)
        level = plan.noise_alpha_cumprod
        x = level**0.5 * z_1CHW + (1.0 - level) ** 0.5 * noise_1CHW
        pictures = []
        with reading_attention(self.sd.unet) as reader:
            for step in plan.steps:
                tokens = torch.cat([self.empty_1LD, c_1LD])
                eps_u, eps_c = self._eps(torch.cat([x, x]), step, tokens).chunk(2)
                eps = eps_u + config.cfg_scale * (eps_c - eps_u)
                if config.sag_scale > 0:
                    degraded = degrade(
                        x, eps_u, reader.received_BN[:1], step.alpha_cumprod, blur_window(x.shape[1]).to(x)
                    )
                    eps = eps + config.sag_scale * (eps_u - self._eps(degraded, step, self.empty_1LD))
                signal, noise = signal_and_noise(step.alpha_cumprod)
                if step.is_guided:
                    eps = eps + noise * self._gradient(x, step, c_1LD, targets)
                signal_next, noise_next = signal_and_noise(step.alpha_cumprod_next)
                x = signal_next * (x - noise * eps) / signal + noise_next * eps
                pictures.append((self.sd.decode(x).float() / 2.0 + 0.5).clamp(0.0, 1.0).cpu())
        return (self.sd.decode(x).float() / 2.0 + 0.5).clamp(0.0, 1.0).cpu()

    def _eps(self, x: torch.Tensor, step: Step, tokens: torch.Tensor) -> torch.Tensor:
        dtype = self.sd.dtype
        timestep = torch.tensor(step.timestep, device=x.device)
        output: torch.Tensor = self.sd.unet(x.to(dtype), timestep, encoder_hidden_states=tokens.to(dtype)).sample
        return output.to(x.dtype)

    def _gradient(
        self, x: torch.Tensor, step: Step, c_1LD: torch.Tensor, targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return kappa dL/dx by plain autograd through everything."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            signal, noise = signal_and_noise(step.alpha_cumprod)
            clean = (leaf - (1.0 - step.alpha_cumprod) * self._eps(leaf, step, c_1LD)) / signal
            estimate = ImageEstimate(noise * clean + (1.0 - noise) * leaf, self.sd.decode)
            loss = self.config.kappa * self.guidance.loss(estimate, self.guidance.prepare(targets)).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient
