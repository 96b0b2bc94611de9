"""A Stable Diffusion folder as an object: text to tokens, pixels to latents and back, and the UNet for the sampler.

Any folder of the family in Hugging Face layout works (widths, sizes and the prediction type are the folder's own).
Sampling is not done here. Shape suffixes: B batch, L tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from nd_dist.errors import CheckpointError
from nd_dist.files import read_json
from nd_dist.frozen.folders import (
    CONFIG_NAME,
    SCHEDULER_CONFIG,
    STABLE_DIFFUSION,
    find_weights,
    list_files,
    model_name,
    resolve_folder,
)
from nd_dist.frozen.weights import DAMAGE, first_line, hash_network, hash_tokenizer

MOST_VALUES = 2**31 - 1
PARTS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class StableDiffusion:
    """The frozen networks of one Stable Diffusion folder, in evaluation mode, on one device.

    Args:
        unet: diffusers' UNet2DConditionModel.
        vae: diffusers' AutoencoderKL.
        scheduler_config: Content of the folder's scheduler configuration (noise schedule, prediction type).
        text_encoder: transformers' CLIPTextModel; None where texts are never encoded (the sampler then needs the
            empty caption's embedding).
        tokenizer: The text encoder's tokenizer, or None.
        name: Model name for the records.
        folder: Where it was read from; None for networks made in memory.
        vae_decode: The VAE's decoder where it is not the VAE's own method (compiled).
    """

    unet: Any  # Any: diffusers and transformers ship no usable types
    vae: Any
    scheduler_config: Mapping[str, Any]
    text_encoder: Any = None
    tokenizer: Any = None
    name: str = "in memory"
    folder: Path | None = None
    vae_decode: Callable[[torch.Tensor], Any] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the networks; a part that was not asked for has shapes only (on ``meta``)."""
        parts = (part for part in (self.unet, self.vae, self.text_encoder) if part is not None)
        devices = (next(part.parameters()).device for part in parts)
        return next((device for device in devices if device.type != "meta"), torch.device("meta"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet's and VAE's weights."""
        return next(self.unet.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def upscale(self) -> int:
        """Pixels per latent along one side (8 for Stable Diffusion)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one latent: the size that the UNet was trained on."""
        size = int(self.unet.config.sample_size)
        return int(self.vae.config.latent_channels), size, size

    @property
    def picture_size(self) -> int:
        """Side in pixels of the square pictures that the VAE encodes and decodes (512 for version 1.4)."""
        return self.latent_shape[1] * self.upscale

    @property
    def vae_layer(self) -> int:
        """Values of one picture in the VAE's largest layer."""
        return int(self.picture_size**2 * max(self.vae.config.block_out_channels[:2]))

    @property
    def most_vae_rows(self) -> int:
        """Most pictures in a pass of the VAE: CUDA kernels count a layer's values in 32 bits (31 of version 1.4)."""
        return max(1, MOST_VALUES // self.vae_layer)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Shape (L, D) of one caption's tokens (77, 768 for version 1.4)."""
        text_encoder, _ = self._require_text()
        return int(text_encoder.config.max_position_embeddings), int(text_encoder.config.hidden_size)

    def _require_text(self) -> tuple[Any, Any]:
        if self.text_encoder is None or self.tokenizer is None:
            raise CheckpointError("A text encoder is needed, and this model was made without one.", where=self.name)
        return self.text_encoder, self.tokenizer

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the text encoder's last hidden state (after the final LayerNorm), float32 (B, L, D).

        Captions are padded to L tokens and cut there.
        """
        text_encoder, tokenizer = self._require_text()
        length = self.text_shape[0]
        tokens = tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        device = next(text_encoder.parameters()).device
        hidden_BLD: torch.Tensor = text_encoder(tokens.input_ids.to(device)).last_hidden_state
        return hidden_BLD.float()

    @torch.no_grad()
    def encode_image(self, pixels_BCHW: torch.Tensor, seeds: Sequence[int] | None = None) -> torch.Tensor:
        """Return scaled latents (B, C, H, W) float32 of pixels in [-1,1].

        Args:
            pixels_BCHW: Pixels of [-1,1] at ``picture_size``.
            seeds: None takes the posterior's mode; otherwise one seed per picture, and a sample is drawn.
        """
        posterior = self.vae.encode(pixels_BCHW.to(self.device, self.dtype)).latent_dist
        latents: torch.Tensor = posterior.mean.float()
        if seeds is not None:
            draws = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            latents = latents + posterior.std.float() * torch.stack(draws).to(latents)
        return latents * float(self.vae.config.scaling_factor)

    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the pixels (B, 3, H, W), about [-1,1], of scaled latents; differentiable, in the VAE's dtype."""
        unscaled = latents_BCHW / float(self.vae.config.scaling_factor)
        pixels: torch.Tensor = (self.vae_decode or self.vae.decode)(unscaled.to(self.dtype)).sample
        return pixels

    def compiled(self, as_graphs: bool = False) -> StableDiffusion:
        """Return the same networks with UNet and VAE decoder compiled for the shapes they meet (torch.compile).

        For passes without gradient only: torch 2.13's compiled gradients of these networks were wrong on a CPU
        (docs/sampler.md), though its compiled outputs were right.

        Args:
            as_graphs: On a GPU every pass is one CUDA graph; a pass then overwrites what the one before returned.
        """
        mode = "reduce-overhead" if as_graphs else None  # torch's name for it
        return replace(
            self,
            unet=torch.compile(self.unet, dynamic=False, mode=mode),
            vae_decode=torch.compile(self.vae.decode, dynamic=False, mode=mode),
        )

    def save_memory(self) -> bool:
        """Recompute activations in gradients instead of keeping them; return whether that is new."""
        if self.unet.is_gradient_checkpointing and self.vae.is_gradient_checkpointing:
            return False
        self.unet.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()
        return True

    def hashes(self, recorded: Collection[str] = ()) -> dict[str, str]:
        """Return the sha256 of every part that defines targets: ``vae``, ``text_encoder``, ``tokenizer``.

        Args:
            recorded: See ``weights.hash_network``.
        """
        if self.folder is None:
            raise CheckpointError("Networks made in memory have no files to record.", where=self.name)
        parts = {part: hash_network(self.folder, part, recorded) for part in ("vae", "text_encoder")}
        return {**parts, "tokenizer": hash_tokenizer(self.folder, recorded)}


def load(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parts: Collection[str] = PARTS,
) -> StableDiffusion:
    """Load a Stable Diffusion folder; weights are frozen and in evaluation mode.

    Args:
        model: A folder in Hugging Face layout, or a name that the local Hugging Face cache holds.
        dtype: Dtype of UNet and VAE; the text encoder stays float32 (it runs once per caption).
        device: Where the networks go.
        parts: What will be run; the others are not read and know their shapes only.

    Raises:
        CheckpointError: a part is missing or torn, or the parts do not fit together.
    """
    folder = resolve_folder(model)
    list_files(folder, STABLE_DIFFUSION)
    classes = zip(PARTS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True)
    networks = {
        part: _load_network(kind, folder, part) if part in parts else _shape_of(kind, folder / part)
        for part, kind in classes
    }
    tokenizer = _load_tokenizer(folder / "tokenizer")
    _check_parts(folder, **networks)
    unet, vae, text_encoder = (
        _freeze(network, torch.float32 if part == "text_encoder" else dtype, device if part in parts else "meta")
        for part, network in networks.items()
    )
    return StableDiffusion(
        unet=unet,
        vae=vae,
        scheduler_config=read_json(folder / "scheduler" / SCHEDULER_CONFIG),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        name=model_name(model),
        folder=folder,
    )


def _shape_of(network_class: Any, folder: Path) -> Any:
    """Return a network without weights, which knows its shapes only (on the device ``meta``)."""
    config = read_json(folder / CONFIG_NAME)
    with torch.device("meta"):
        if network_class is CLIPTextModel:
            return CLIPTextModel(CLIPTextConfig.from_dict(config))
        return network_class.from_config(config)


def _load_network(network_class: Any, model: Path, part: str) -> Any:
    """Return a network with every weight read from the files that ``find_weights`` names.

    Raises:
        CheckpointError: weights are missing, torn, left over or of another shape.
    """
    folder = model / part
    options = find_weights(model, part).options
    if network_class is not CLIPTextModel:
        options["low_cpu_mem_usage"] = False
    try:
        network, report = network_class.from_pretrained(folder, output_loading_info=True, **options)
    except DAMAGE as error:
        raise CheckpointError(
            "A network could not be read.",
            where=str(folder),
            found=first_line(error),
            todo="copy this part of the model folder again; its weights must belong to its config.json",
        ) from error
    problems = {key: sorted(map(str, report.get(key, []))) for key in ("missing_keys", "mismatched_keys")}
    if any(problems.values()):
        raise CheckpointError(
            "A network's weights do not belong to its configuration.",
            where=str(folder),
            expected="every parameter in the file, in the configured shape",
            found="; ".join(f"{key}: {names[:3]}" for key, names in problems.items() if names),
        )
    return network


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "A tokenizer could not be read.", where=str(folder), found=str(error).strip().splitlines()[0]
        ) from error


def _check_parts(folder: Path, unet: Any, vae: Any, text_encoder: Any) -> None:
    pairs = (
        ("text width", unet.config.cross_attention_dim, text_encoder.config.hidden_size, "text_encoder"),
        ("latent channels", unet.config.in_channels, vae.config.latent_channels, "vae"),
    )
    for what, expected, found, part in pairs:
        if expected != found:
            raise CheckpointError(
                f"The parts of a model folder do not fit together: {what}.",
                where=str(folder),
                expected=f"{expected} (unet)",
                found=f"{found} ({part})",
                todo="take all parts from the same model",
            )


def _freeze(network: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Return a network without gradients, in evaluation mode, on the device and in the dtype."""
    network.requires_grad_(False).eval()
    torch.nn.Module.to(network, device=device, dtype=dtype)  # diffusers' own `to` warns of nothing at all
    if torch.device(device).type == "cuda":
        network.to(memory_format=torch.channels_last)  # what tensor cores want of convolutions
    return network
