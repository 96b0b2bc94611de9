"""Memory: of a process, and what a gradient keeps, counted on the meta device where nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.support.networks import Width, make_networks


def peak_memory() -> int:
    """Return the largest resident size of this process (``ru_maxrss`` would count the one that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def kept_bytes(width: Width, dtype: torch.dtype, checkpointing: bool) -> dict[str, int]:
    """Return what the gradients of UNet and VAE decoder keep for one picture, and the bytes of all weights.

    An upper bound: attention is counted unfused.
    """
    sd, clip = make_networks(width, "meta", dtype)
    if checkpointing:
        sd.save_memory()
    tokens = torch.empty(1, *width.text, device="meta", dtype=dtype)
    timestep = torch.tensor(1, device="meta")
    latents = torch.empty(1, *sd.latent_shape, device="meta", dtype=dtype, requires_grad=True)
    weights = [weight for network in (sd.unet, sd.vae, clip.tower) for weight in network.parameters()]
    own = {_storage(weight) for weight in weights}
    return {
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "unet": _kept(lambda: sd.unet(latents, timestep, encoder_hidden_states=tokens).sample, own),
        "vae": _kept(lambda: sd.decode(latents), own),
    }


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kept(run: Callable[[], torch.Tensor], not_counted: set[int]) -> int:
    kept: dict[int, torch.UntypedStorage] = {}  # storages stay referenced: their addresses must not be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in not_counted:
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total
