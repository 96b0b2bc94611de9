"""One step's noise prediction: the UNet, classifier-free guidance, self-attention guidance, the guidance gradient.

Notation, at a timestep with noise level abar, b = 1 - abar:

    x      latents (B, C, H, W)                  eps_u  noise prediction with the empty caption
    c      caption tokens (B, L, D)              eps_c  noise prediction with the caption
    m      latents of the image estimate         v      kappa times dL/dm

    clean = (x - k eps_c) / sqrt(abar)           k = b as released, sqrt(b) as DDIM defines it
    m     = sqrt(b) clean + (1 - sqrt(b)) x
    dL/dx = (sqrt(b)/sqrt(abar) + 1 - sqrt(b)) v - sqrt(b) k / sqrt(abar) J^T v,   J = d eps_c / dx

so that VAE and guidance network are differentiated apart from the UNet, in chunks of their own, and the UNet pass that
predicts eps_c is the one that is differentiated. Source: NeuralDiffuser, section III-C, as released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nd_dist.compute.chunks import AdaptiveChunks
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.attention_guidance import AttentionReader, blur_window, degrade
from nd_dist.diffusion.guidance import Guidance, ImageEstimate
from nd_dist.diffusion.schedule import Prediction, Step, signal_and_noise
from nd_dist.frozen.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Conditions:
    """What the samples are steered by, one row each.

    Args:
        empty_BLD: The empty caption's tokens.
        caption_BLD: The captions' tokens.
        prepared: What the guidance prepared.
    """

    empty_BLD: torch.Tensor
    caption_BLD: torch.Tensor
    prepared: Mapping[str, torch.Tensor]

    def rows(self, rows: slice) -> Conditions:
        """Return some rows."""
        prepared = {name: values[rows] for name, values in self.prepared.items()}
        return Conditions(self.empty_BLD[rows], self.caption_BLD[rows], prepared)


@dataclass(frozen=True)
class NoisePrediction:
    """What one step predicts.

    Args:
        eps_BCHW: Noise prediction after classifier-free and self-attention guidance.
        gradient_BCHW: kappa dL/dx; zero where the step is not guided.
        loss_B: Guidance loss of each sample; zero where the step is not guided.
    """

    eps_BCHW: torch.Tensor
    gradient_BCHW: torch.Tensor
    loss_B: torch.Tensor


@dataclass(frozen=True)
class Networks:
    """What a step evaluates.

    Args:
        differentiable: UNet and VAE of the guidance gradient.
        forward: UNet of all other passes; the same networks, perhaps compiled.
        guidance: The guidance term.
    """

    differentiable: StableDiffusion
    forward: StableDiffusion
    guidance: Guidance


class Denoiser:
    """Predicts the noise of a step for a batch of samples; rows do not depend on each other.

    Args:
        networks: UNet, VAE and guidance.
        prediction: What the UNet puts out.
        config: Scales and switches.
        vae_chunks: Chunks of the VAE's gradient.
    """

    def __init__(
        self,
        networks: Networks,
        prediction: Prediction,
        config: SamplerConfig,
        vae_chunks: AdaptiveChunks,
    ) -> None:
        self._sd, self._forward, self._guidance = networks.differentiable, networks.forward, networks.guidance
        self._prediction = prediction
        self._config, self._vae_chunks = config, vae_chunks
        # constants lie on the device from the start: the host would wait for the GPU whenever it sent one
        sd = self._sd
        self._timesteps = torch.arange(int(sd.scheduler_config.get("num_train_timesteps", 1000)), device=sd.device)
        wide = torch.promote_types(sd.dtype, torch.float32)
        self._window = blur_window(sd.latent_shape[0]).to(sd.device, wide)

    def eps(self, x_BCHW: torch.Tensor, step: Step, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """Return the UNet's prediction as noise, in the dtype of x."""
        dtype = self._sd.dtype
        timestep = self._timesteps[step.timestep]
        unet = self._sd.unet if torch.is_grad_enabled() else self._forward.unet
        output = unet(x_BCHW.to(dtype), timestep, encoder_hidden_states=tokens_BLD.to(dtype)).sample
        output = self._kept(output).to(x_BCHW.dtype)
        if self._prediction == "v_prediction":
            signal, noise = signal_and_noise(step.alpha_cumprod)
            return signal * output + noise * x_BCHW
        return output

    def _kept(self, output: torch.Tensor) -> torch.Tensor:
        """Return what the UNet gave, copied where the next pass of a CUDA graph would overwrite it."""
        return output.clone() if self._config.compile == "cuda-graphs" else output

    @torch.no_grad()
    def predict(
        self, x_BCHW: torch.Tensor, step: Step, conditions: Conditions, kappa: float, reader: AttentionReader | None
    ) -> NoisePrediction:
        """Return the prediction of a step.

        Args:
            x_BCHW: Latents.
            step: Timestep, noise level, and whether it is guided.
            conditions: Captions and prepared guidance targets.
            kappa: Guidance scale.
            reader: Reads the UNet's middle attention; None leaves self-attention guidance out.
        """
        num = len(x_BCHW)
        gradient, loss = torch.zeros_like(x_BCHW), x_BCHW.new_zeros(num)
        if step.is_guided:
            eps_u = self.eps(x_BCHW, step, conditions.empty_BLD)
            received = self._kept(reader.received_BN) if reader else None
            eps_c, gradient, loss = self._guided(x_BCHW, step, conditions, kappa)
        else:
            tokens = torch.cat([conditions.empty_BLD, conditions.caption_BLD])
            eps_u, eps_c = self.eps(torch.cat([x_BCHW, x_BCHW]), step, tokens).chunk(2)
            received = reader.received_BN[:num] if reader else None
        eps = eps_u + self._config.cfg_scale * (eps_c - eps_u)
        if received is not None:
            degraded = degrade(x_BCHW, eps_u, received, step.alpha_cumprod, self._window)
            eps = eps + self._config.sag_scale * (eps_u - self.eps(degraded, step, conditions.empty_BLD))
        return NoisePrediction(eps, gradient, loss)

    def _guided(
        self, x_BCHW: torch.Tensor, step: Step, conditions: Conditions, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return eps_c (without graph), kappa dL/dx, and the loss (B,)."""
        signal, noise = signal_and_noise(step.alpha_cumprod)
        factor = 1.0 - step.alpha_cumprod if self._config.x0_form == "official" else noise
        x_leaf = x_BCHW.detach().requires_grad_(self._config.unet_gradient)
        with torch.set_grad_enabled(self._config.unet_gradient):
            eps_c = self.eps(x_leaf, step, conditions.caption_BLD)
        clean = (x_BCHW - factor * eps_c.detach()) / signal
        estimate = noise * clean + (1.0 - noise) * x_BCHW
        v, loss = self.latent_gradient(estimate, conditions.prepared, kappa)
        gradient = (noise / signal + 1.0 - noise) * v
        if self._config.unet_gradient:
            (through_unet,) = torch.autograd.grad(eps_c, x_leaf, grad_outputs=-noise * factor / signal * v)
            gradient = gradient + through_unet
        return eps_c.detach(), gradient, loss

    def latent_gradient(
        self, estimate_BCHW: torch.Tensor, prepared: Mapping[str, torch.Tensor], kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return v = kappa dL/dm of every sample, (B, C, H, W), and its loss (B,), in chunks.

        kappa enters before the backward pass: in float16 it keeps small gradients from vanishing.
        """

        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            leaf = estimate_BCHW[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                targets = {name: values[rows] for name, values in prepared.items()}
                loss_B = self._guidance.loss(ImageEstimate(leaf, self._decode), targets)
                (v,) = torch.autograd.grad(kappa * loss_B.sum(), leaf)
            return v, loss_B.detach()

        v, loss_B = self._vae_chunks.run(len(estimate_BCHW), of_rows)
        return v, loss_B

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the pixels that the guidance looks at."""
        half = self._config.guidance_decode == "half"
        return self._sd.decode(F.avg_pool2d(latents_BCHW, 2) if half else latents_BCHW)
