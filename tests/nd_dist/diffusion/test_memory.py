from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nd_dist.compute.chunks import OutOfMemory
from nd_dist.config import SamplerConfig
from nd_dist.diffusion.clip_guidance import ClipGuidance
from nd_dist.diffusion.memory import plan_chunks
from nd_dist.diffusion.sampler import GuidedSampler
from nd_dist.frozen import stable_diffusion
from nd_dist.frozen.stable_diffusion import StableDiffusion
from tests.nd_dist.diffusion.support.toy_inputs import Inputs, make_inputs

SHORT: dict[str, Any] = {"num_steps": 6, "eta": 0.5, "kappa": 3000.0}


@pytest.fixture
def own_sd64(sd_dir: Path) -> StableDiffusion:
    """Networks that a test may switch to checkpointing."""
    return stable_diffusion.load(sd_dir, dtype=torch.float64)


@pytest.fixture(scope="module")
def inputs(sd64: StableDiffusion, clip64: Any) -> Inputs:
    return make_inputs(sd64, clip64)


def latents(sd: StableDiffusion, guidance: ClipGuidance, inputs: Inputs, **config: Any) -> torch.Tensor:
    made = GuidedSampler(sd, guidance, SamplerConfig(**{**SHORT, **config}))
    return made.sample(*inputs.arguments).latents_BCHW


@pytest.mark.parametrize("rows", [1, 2])
def test_limits_change_results_by_rounding_only(
    sd64: StableDiffusion, guidance64: ClipGuidance, inputs: Inputs, rows: int
) -> None:
    whole = latents(sd64, guidance64, inputs)
    torch.testing.assert_close(latents(sd64, guidance64, inputs, max_rows=rows), whole, rtol=0, atol=1e-9)


def saved_bytes(call: Callable[[], object]) -> int:
    """Return how much autograd keeps for gradients during a call."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_checkpointing_gives_the_same_pictures_and_keeps_less(
    sd64: StableDiffusion, own_sd64: StableDiffusion, guidance64: ClipGuidance, inputs: Inputs
) -> None:
    plain = latents(sd64, guidance64, inputs)
    saving = latents(own_sd64, guidance64, inputs, checkpointing="always")
    torch.testing.assert_close(saving, plain, rtol=0, atol=1e-9)

    def decode(sd: StableDiffusion) -> None:
        sd.decode(torch.zeros(1, *sd.latent_shape, dtype=sd.dtype, requires_grad=True))

    assert saved_bytes(lambda: decode(own_sd64)) < 0.5 * saved_bytes(lambda: decode(sd64))


class SmallMemory(torch.nn.Module):
    """A VAE on a card that has room for its gradient only with checkpointing, or not even then."""

    def __init__(self, vae: Any, fits_checkpointed: bool = True) -> None:
        super().__init__()
        self.vae, self.fits_checkpointed, self.refused = vae, fits_checkpointed, 0
        self.config = vae.config

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.vae.is_gradient_checkpointing)

    def enable_gradient_checkpointing(self) -> None:
        self.vae.enable_gradient_checkpointing()

    def decode(self, latents: torch.Tensor) -> Any:
        fits = self.fits_checkpointed and self.is_gradient_checkpointing and len(latents) == 1
        if torch.is_grad_enabled() and not fits:
            self.refused += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.vae.decode(latents)


def test_a_card_without_room_for_one_gradient_gets_checkpointing_by_itself(
    sd64: StableDiffusion, own_sd64: StableDiffusion, guidance64: ClipGuidance, inputs: Inputs
) -> None:
    vae = SmallMemory(own_sd64.vae)
    small = replace(own_sd64, vae=vae)
    made = latents(small, guidance64, inputs)
    assert vae.refused > 0
    assert own_sd64.unet.is_gradient_checkpointing
    torch.testing.assert_close(made, latents(sd64, guidance64, inputs), rtol=0, atol=1e-9)


def test_a_card_without_room_even_then_ends_with_advice(
    own_sd64: StableDiffusion, guidance64: ClipGuidance, inputs: Inputs
) -> None:
    small = replace(own_sd64, vae=SmallMemory(own_sd64.vae, fits_checkpointed=False))
    with pytest.raises(OutOfMemory, match="bfloat16"):
        latents(small, guidance64, inputs)


class Meter:
    """A device with room for a given number of rows, whatever is run."""

    def __init__(self, rows: float) -> None:
        self.rows = rows

    def free_bytes(self) -> int:
        return int(100 * self.rows)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 85


def test_with_a_meter_memory_decides_and_max_rows_overrules_it(sd: StableDiffusion) -> None:
    def rows_of(sizes: list[int]) -> Callable[[slice], tuple[torch.Tensor, ...]]:
        def compute(rows: slice) -> tuple[torch.Tensor, ...]:
            sizes.append(rows.stop - rows.start)
            return (torch.arange(rows.start, rows.stop),)

        return compute

    sizes: list[int] = []
    plan_chunks(sd, SamplerConfig(), Meter(3.0)).guided.run(5, rows_of(sizes))
    assert sizes == [1, 3, 2]
    sizes.clear()
    plan_chunks(sd, SamplerConfig(max_rows=2), Meter(3.0)).guided.run(5, rows_of(sizes))
    assert sizes == [2, 2, 1]
    chunks = plan_chunks(sd, SamplerConfig())
    assert chunks.for_step(True) is chunks.guided
    assert chunks.for_step(False) is chunks.unguided
