"""What the sampler costs at full Stable Diffusion 1.4 size, counted on the meta device: no GPU, no memory, seconds.

Floating-point operations of each pass and of a picture, and what a gradient keeps in memory.

python -m benchmarks.flops
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.support.flops import pass_costs
from benchmarks.support.memory import kept_bytes
from benchmarks.support.networks import WIDTHS
from nd_dist.config import SamplerConfig

TERA = 1e12


def main() -> None:
    """Print the cost of each pass and of a picture under each setting."""
    costs = pass_costs(WIDTHS["sd14"])
    print("TFLOP of one pass, one picture of 512 x 512 (2 per multiply-add)")
    for field in dataclasses.fields(costs):
        print(f"  {field.name:22s}{getattr(costs, field.name) / TERA:8.4f}")
    base = SamplerConfig()
    settings = {
        "guided sampler (exact)": base,
        "SAG off (other results)": SamplerConfig(sag_scale=0.0),
        "approximation: no UNet gradient": SamplerConfig(unet_gradient=False),
        "approximation: half guidance decode": SamplerConfig(guidance_decode="half"),
        "SAG off, half guidance decode": SamplerConfig(sag_scale=0.0, guidance_decode="half"),
    }
    published = costs.published(base)
    print("TFLOP of one picture: 50 steps, strength 0.75, eta 0.2, self-attention guidance")
    print(f"  {'published procedure':38s}{published / TERA:8.1f}")
    for label, config in settings.items():
        cost = costs.sampler(config)
        print(f"  {label:38s}{cost / TERA:8.1f}  x{published / cost:.2f}")
    print("GiB that a guided step keeps for the gradient of one picture (at most), beside weights")
    for dtype in (torch.bfloat16, torch.float32):
        for checkpointing in (False, True):
            kept = kept_bytes(WIDTHS["sd14"], dtype, checkpointing)
            label = f"{str(dtype).removeprefix('torch.')}{', checkpointing' if checkpointing else ''}"
            print(f"  {label:26s}" + "  ".join(f"{name} {size / 2**30:.2f}" for name, size in kept.items()))


if __name__ == "__main__":
    main()
