"""How the sampler's computations are cut into chunks on a device: guided and unguided steps, the VAE."""

from __future__ import annotations

from dataclasses import dataclass

from nd_dist.compute.chunks import CPU_UNET_BYTES, CPU_VAE_BYTES, AdaptiveChunks, CudaMeter, MemoryMeter, cpu_rows
from nd_dist.config import SamplerConfig
from nd_dist.frozen.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class SamplerChunks:
    """Chunks of each computation; a limit that one of them found holds for it alone.

    Args:
        guided: A guided step: UNet with its graph, VAE, guidance network.
        unguided: A step without gradient.
        vae: The VAE's gradient, within a guided step.
        decode: The VAE without gradient.
    """

    guided: AdaptiveChunks
    unguided: AdaptiveChunks
    vae: AdaptiveChunks
    decode: AdaptiveChunks

    def for_step(self, is_guided: bool) -> AdaptiveChunks:
        """Return the chunks of a step."""
        return self.guided if is_guided else self.unguided


def plan_chunks(sd: StableDiffusion, config: SamplerConfig, meter: MemoryMeter | None = None) -> SamplerChunks:
    """Return the chunks for a model on its device.

    Args:
        sd: The networks.
        config: ``max_rows`` and ``checkpointing``.
        meter: The device's memory; none takes the device's own.
    """
    if config.checkpointing == "always":
        sd.save_memory()
    if meter is None and sd.device.type == "cuda":
        meter = CudaMeter(sd.device)
    unet_rows = vae_rows = config.max_rows
    if meter is None:
        unet_layer = sd.latent_shape[1] ** 2 * int(sd.unet.config.block_out_channels[0])
        unet_rows = _at_most(config.max_rows, cpu_rows(unet_layer, CPU_UNET_BYTES))
        vae_rows = _at_most(config.max_rows, cpu_rows(sd.vae_layer, CPU_VAE_BYTES))
    return SamplerChunks(
        guided=AdaptiveChunks("a guided step", unet_rows, meter, sd.save_memory),
        unguided=AdaptiveChunks("a step of the UNet", unet_rows, meter),
        vae=AdaptiveChunks("the VAE's gradient", vae_rows, meter, most=sd.most_vae_rows),
        decode=AdaptiveChunks("the VAE's decoder", vae_rows, meter, most=sd.most_vae_rows),
    )


def _at_most(limit: int | None, rows: int) -> int:
    return rows if limit is None else min(limit, rows)
