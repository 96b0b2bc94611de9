"""Floating-point operations of a call, and of the sampler's passes without computing them (meta device).

On a CPU fused attention is no operation that torch counts; on the meta device every product is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.support.networks import Width, make_networks
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.schedule import num_guided


class _FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own operation counts; unlike FlopCounterMode it also sees gradients of leaf tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its count."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result))
        return result


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations of a call (2 per multiply-add)."""
    with _FlopCount() as counter:
        run()
    return int(counter.total)


@dataclass(frozen=True)
class PassCosts:
    """Floating-point operations of one pass for one picture.

    Args:
        unet: UNet forward.
        unet_gradient: UNet forward and the gradient of its input.
        decode: VAE decoder.
        decode_gradient: VAE decoder and the gradient of its input.
        half_decode_gradient: The same for latents of half the side.
        encode: VAE encoder.
        clip: The guidance CLIP's blocks.
        clip_gradient: The same and the gradient of its input.
    """

    unet: int
    unet_gradient: int
    decode: int
    decode_gradient: int
    half_decode_gradient: int
    encode: int
    clip: int
    clip_gradient: int

    def published(self, config: SamplerConfig) -> int:
        """Return the cost of a picture as released: UNet once more for the gradient, all latents decoded."""
        steps, guided = _steps(config)
        passes = (3 if config.sag_scale > 0 else 2) * steps
        gradients = self.unet_gradient + self.decode_gradient + self.clip_gradient
        return passes * self.unet + guided * gradients + (steps + 1) * self.decode

    def sampler(self, config: SamplerConfig) -> int:
        """Return the cost of a picture here."""
        steps, guided = _steps(config)
        passes = (3 if config.sag_scale > 0 else 2) * steps - guided
        vae = self.half_decode_gradient if config.guidance_decode == "half" else self.decode_gradient
        unet = self.unet_gradient if config.unet_gradient else self.unet
        return passes * self.unet + guided * (unet + vae + self.clip_gradient) + self.decode


def _steps(config: SamplerConfig) -> tuple[int, int]:
    steps = max(1, int(config.num_steps * config.strength))
    return steps, num_guided(steps, config.eta)


def pass_costs(width: Width) -> PassCosts:
    """Return the cost of each pass at a width; nothing is computed and no memory is taken."""
    sd, clip = make_networks(width, "meta", torch.float32)
    tokens = torch.empty(1, *width.text, device="meta")
    timestep = torch.tensor(1, device="meta")
    side = width.latent
    pixels = torch.empty(1, 3, clip.image_size, clip.image_size, device="meta")

    def unet(latents: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = sd.unet(latents, timestep, encoder_hidden_states=tokens).sample
        return output

    def features(inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([feature.flatten() for feature in clip.features(inputs)])

    full, half = (torch.empty(1, 4, size, size, device="meta") for size in (side, side // 2))
    picture = torch.empty(1, 3, sd.picture_size, sd.picture_size, device="meta")
    with torch.no_grad():
        encode = count_flops(lambda: sd.vae.encode(picture))
    return PassCosts(
        unet=_forward(unet, full),
        unet_gradient=_with_gradient(unet, full),
        decode=_forward(sd.decode, full),
        decode_gradient=_with_gradient(sd.decode, full),
        half_decode_gradient=_with_gradient(sd.decode, half),
        encode=encode,
        clip=_forward(features, pixels),
        clip_gradient=_with_gradient(features, pixels),
    )


Network = Callable[[torch.Tensor], torch.Tensor]


def _forward(network: Network, inputs: torch.Tensor) -> int:
    with torch.no_grad():
        return count_flops(lambda: network(inputs))


def _with_gradient(network: Network, inputs: torch.Tensor) -> int:
    def run() -> None:
        leaf = inputs.clone().requires_grad_(True)
        torch.autograd.grad(network(leaf).sum(), leaf)

    return count_flops(run)
