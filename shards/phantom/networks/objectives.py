"""What each phantom network minimises. Pure: losses are functions of weights and rows; nothing is updated here.

Legend: B rows of this rank, N rows of the global batch, C channels, H height, W width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nd_dist.pixels import normalize_pixels
from nd_dist.training.ranks import Gather, identity
from shards.phantom.backgrounds import PLACES
from shards.phantom.captions import NUM_CAPTIONS, captions_of
from shards.phantom.networks.architectures import LATENT_SIZE, MAX_TOKENS, SCHEDULER_CONFIG, TEXT_WIDTH
from shards.phantom.networks.batches import Rows, labels_of, pixels_of
from shards.phantom.scenes import Scene
from shards.phantom.sprites import sprites

KL_WEIGHT = 1e-4
COLOR_FROM_STEP, CHROMA_FROM_STEP = 1000, 1750
"""From these steps on the VAE is also judged by 4x4 means of its error, and by the differences between their channels:
edges are learned first, hues last."""
MIN_SNR = 5.0
EMPTY_PERCENT = 10
"""Of 100 rows so many have the empty caption, so that classifier-free guidance works."""
MEAN_PERCENT = 50
"""Of 100 rows so many have the mean over all five captions, which is what the decoder predicts."""


Objective = Callable[[Any, Rows], dict[str, torch.Tensor]]  # Any: diffusers and transformers ship no usable types
"""A loss of a network on rows: ``loss`` to minimise and further scalars to report."""


def vae_loss(vae: Any, rows: Rows) -> dict[str, torch.Tensor]:
    """Return the VAE's loss: errors of pixels, of slopes and (later) of colours, and KL to N(0, 1)."""
    pixels_BCHW = 2 * pixels_of(rows.scenes(), rows.device) - 1
    posterior = vae.encode(pixels_BCHW).latent_dist
    latents_BCHW = posterior.mean + posterior.std * rows.normal("posterior", 4, LATENT_SIZE, LATENT_SIZE)
    error_BCHW = vae.decode(latents_BCHW).sample.float() - pixels_BCHW
    squared = error_BCHW.square().mean()
    slopes = sum(error_BCHW.diff(dim=dim).abs().mean() for dim in (2, 3))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = error_BCHW.abs().mean() + squared + 0.5 * slopes + KL_WEIGHT * kl
    means_BCHW = F.avg_pool2d(error_BCHW, 4)
    if rows.step >= COLOR_FROM_STEP:
        loss = loss + 2 * means_BCHW.abs().mean()
    if rows.step >= CHROMA_FROM_STEP:
        loss = loss + 4 * means_BCHW.diff(dim=1).abs().mean()
    return {"loss": loss, "squared": squared.detach(), "kl": kl.detach()}


class ClipWithClassifiers(nn.Module):
    """CLIP and two linear classifiers that both towers share in training; they are dropped afterwards.

    Args:
        clip: transformers' CLIPModel.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))  # DeepSpeed broadcasts no numbers
        self.clip = clip
        self.objects = nn.Linear(TEXT_WIDTH, len(sprites()))
        self.places = nn.Linear(TEXT_WIDTH, len(PLACES))


class ClipObjective:
    """CLIP's contrastive loss plus classification of objects and places from both embeddings.

    Args:
        tokenizer: Turns captions into ids.
        gather: How rows of all ranks are collected: every row of the global batch is contrasted with all others.
    """

    def __init__(self, tokenizer: Any, gather: Gather = identity) -> None:
        self._tokenizer, self._gather = tokenizer, gather

    def __call__(self, network: ClipWithClassifiers, rows: Rows) -> dict[str, torch.Tensor]:
        """Return the loss and the top-1 retrieval rate within the global batch."""
        scenes = rows.scenes()
        chosen = rows.integers("caption", NUM_CAPTIONS).tolist()
        captions = [captions_of(scene)[number] for scene, number in zip(scenes, chosen, strict=True)]
        pixels_BCHW = normalize_pixels(pixels_of(scenes, rows.device), "imagenet")
        output = network.clip(input_ids=tokenize(self._tokenizer, captions, rows.device), pixel_values=pixels_BCHW)
        image_ND, text_ND = self._gather(output.image_embeds), self._gather(output.text_embeds)
        logits_NN = (network.clip.logit_scale.exp() * (text_ND @ image_ND.T)).T.float()
        targets_N = torch.arange(len(logits_NN), device=rows.device)
        contrastive = (F.cross_entropy(logits_NN, targets_N) + F.cross_entropy(logits_NN.T, targets_N)) / 2
        objects_BO, places_B = labels_of(scenes, rows.device)
        classes = torch.zeros((), device=rows.device)
        for embeds_BD in (output.image_embeds, output.text_embeds):
            scaled_BD = embeds_BD.float() * TEXT_WIDTH**0.5
            classes = classes + F.cross_entropy(network.objects(scaled_BD), objects_BO)
            classes = classes + F.cross_entropy(network.places(scaled_BD), places_B)
        top1 = (logits_NN.argmax(1) == targets_N).float().mean()
        return {"loss": contrastive + classes / 2, "contrastive": contrastive.detach(), "top1": top1}


def judges_loss(judges: Any, rows: Rows) -> dict[str, torch.Tensor]:
    """Return the summed classification loss of all judges (a ModuleDict) and each one's object loss."""
    scenes = rows.scenes()
    pixels_BCHW = pixels_of(scenes, rows.device)
    objects_BO, places_B = labels_of(scenes, rows.device)
    losses: dict[str, torch.Tensor] = {"loss": torch.zeros((), device=rows.device)}
    for kind, judge in judges.items():
        objects_logits, places_logits = judge(pixels_BCHW)
        of_objects = F.cross_entropy(objects_logits.float(), objects_BO)
        losses["loss"] = losses["loss"] + of_objects + F.cross_entropy(places_logits.float(), places_B)
        losses[kind] = of_objects.detach()
    return losses


class UNetObjective:
    """Noise prediction on latents, given captions, with min-SNR weights.

    Args:
        vae: Frozen VAE whose ``config.scaling_factor`` is set.
        text_encoder: Frozen CLIPTextModel.
        tokenizer: Its tokenizer.
        views: Rows in succession that share picture and text, each with its own noise (encoding is then cheaper).

    Source:
        Ho et al. 2020, eq. 14 (loss); Hang et al. 2023, "Min-SNR weighting strategy", gamma = 5;
        Ho and Salimans 2022 (empty captions).
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, views: int = 2) -> None:
        self._vae, self._text_encoder, self._tokenizer, self._views = vae, text_encoder, tokenizer, views

    def __call__(self, unet: Any, rows: Rows) -> dict[str, torch.Tensor]:
        """Return the weighted loss and the plain mean squared error of the noise."""
        pictures = [row // self._views for row in rows.rows]
        shown = range(pictures[0], pictures[-1] + 1)
        scenes = Rows(rows.seed, rows.step, shown, rows.device).scenes()
        with torch.no_grad():
            pixels_BCHW = 2 * pixels_of(scenes, rows.device) - 1
            latents_BCHW = self._vae.encode(pixels_BCHW).latent_dist.mean * self._vae.config.scaling_factor
            text_BLD = self._texts(scenes, Rows(rows.seed, rows.step, shown, rows.device))
        places = [picture - shown.start for picture in pictures]
        latents_BCHW, text_BLD = latents_BCHW[places], text_BLD[places]
        noise_BCHW = rows.normal("noise", 4, LATENT_SIZE, LATENT_SIZE)
        times_B = rows.integers("time", int(str(SCHEDULER_CONFIG["num_train_timesteps"])))
        abar_B = alphas_cumprod().to(rows.device)[times_B]
        abar_B111 = abar_B[:, None, None, None]
        noisy_BCHW = abar_B111.sqrt() * latents_BCHW + (1 - abar_B111).sqrt() * noise_BCHW
        predicted_BCHW = unet(noisy_BCHW, times_B, encoder_hidden_states=text_BLD).sample.float()
        error_B = (predicted_BCHW - noise_BCHW).square().mean((1, 2, 3))
        snr_B = abar_B / (1 - abar_B)
        return {"loss": (error_B * snr_B.clamp(max=MIN_SNR) / snr_B).mean(), "mse": error_B.detach().mean()}

    def _texts(self, scenes: Sequence[Scene], rows: Rows) -> torch.Tensor:
        """Return text tokens (B, L, D): empty, one caption's, or the mean over all five, by picture."""
        choice, number = rows.integers("text", 100).tolist(), rows.integers("caption", NUM_CAPTIONS).tolist()
        groups: list[tuple[str, ...]] = []
        for scene, percent, index in zip(scenes, choice, number, strict=True):
            captions = captions_of(scene)
            is_mean = percent >= 100 - MEAN_PERCENT
            groups.append(("",) if percent < EMPTY_PERCENT else captions if is_mean else (captions[index],))
        return encode_mean(self._text_encoder, self._tokenizer, groups, rows.device)


@torch.no_grad()
def encode_mean(
    text_encoder: Any, tokenizer: Any, groups: Sequence[Sequence[str]], device: torch.device
) -> torch.Tensor:
    """Return, for every group of captions, the mean of their last hidden states: (B, L, D) float32."""
    flat = [caption for group in groups for caption in group]
    hidden = text_encoder(tokenize(tokenizer, flat, device)).last_hidden_state.float()
    sizes = [len(group) for group in groups]
    return torch.stack([part.mean(0) for part in hidden.split(sizes)])


def tokenize(tokenizer: Any, captions: Sequence[str], device: torch.device) -> torch.Tensor:
    """Return padded caption ids (B, L) int64."""
    options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
    ids: torch.Tensor = tokenizer(list(captions), return_tensors="pt", **options).input_ids
    return ids.to(device)


def alphas_cumprod() -> torch.Tensor:
    """Return the cumulative alphas (1000,) float32 of Stable Diffusion 1.4's schedule."""
    start, end = float(str(SCHEDULER_CONFIG["beta_start"])), float(str(SCHEDULER_CONFIG["beta_end"]))
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()
