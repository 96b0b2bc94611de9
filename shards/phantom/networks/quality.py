"""Measures the phantom networks on scenes that no training stream shows: the figures of the model cards.

Legend: B pictures, C channels, H height, W width, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from nd_dist.pixels import normalize_pixels
from nd_dist.seeds import unit_seed
from shards.phantom.captions import captions_of
from shards.phantom.networks.architectures import LATENT_SIZE, SCHEDULER_CONFIG
from shards.phantom.networks.batches import labels_of, pixels_of
from shards.phantom.networks.folders import CPU, Networks, text_encoder_of
from shards.phantom.networks.objectives import encode_mean, tokenize
from shards.phantom.pictures import evaluation_scene, training_scene
from shards.phantom.scenes import HeldOut, Scene

EVALUATION_SEED = 99
RETRIEVAL_TEXTS = 300
DRAW_STEPS = 25
CFG_SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)
"""Classifier-free guidance that pictures are drawn at: 0 ignores the captions, 1 does not guide."""
DRAW_CFG = 3.0
Figures = dict[str, float]


def evaluation_scenes(num: int, held_out: HeldOut) -> list[Scene]:
    """Return ``num`` scenes of a kind from the networks' own evaluation stream."""
    return [evaluation_scene(EVALUATION_SEED, number, held_out) for number in range(num)]


def psnr(pixels_BCHW: torch.Tensor, other_BCHW: torch.Tensor) -> float:
    """Return the mean over pictures of the peak signal-to-noise ratio in dB; pixels in [0, 1]."""
    error_B = (pixels_BCHW - other_BCHW).double().square().mean((1, 2, 3))
    return float((-10 * error_B.log10()).mean())


@torch.no_grad()
def reconstruct(vae: Any, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Return pictures in [0, 1] after the VAE's encoder (mode) and decoder."""
    decoded = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in torch.split(pixels_BCHW, 32)]
    return _to_unit(torch.cat(decoded))


def _to_unit(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Return pixels of [-1, 1] in [0, 1], clamped."""
    unit_BCHW: torch.Tensor = (pixels_BCHW / 2 + 0.5).clamp(0, 1)
    return unit_BCHW


def pca_reconstruct(pixels_BCHW: torch.Tensor, fitted_BCHW: torch.Tensor) -> torch.Tensor:
    """Return pictures after a linear code of the VAE's size: 4 principal components of every 4x4x3 patch."""
    patches_BP48, fitted_N48 = _patches(pixels_BCHW), _patches(fitted_BCHW).flatten(0, 1)
    mean_48 = fitted_N48.mean(0)
    _, _, components = torch.linalg.svd((fitted_N48 - mean_48).T @ (fitted_N48 - mean_48))
    basis = components[:4].T
    coded_BP48 = (patches_BP48 - mean_48) @ basis @ basis.T + mean_48
    return F.fold(coded_BP48.mT, pixels_BCHW.shape[2:], 4, stride=4).float().clamp(0, 1)


def _patches(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the 4x4 patches of every picture, (B, patches, 48) float64."""
    return F.unfold(pixels_BCHW.double(), 4, stride=4).mT


def vae_figures(vae: Any, num: int) -> Figures:
    """Return PSNR on held-out combinations and objects, and that of PCA with a code of the same size."""
    fitted = pixels_of([training_scene(EVALUATION_SEED, 0, row) for row in range(num)], CPU)
    figures: Figures = {}
    kinds: tuple[HeldOut, ...] = ("combination", "object")
    for kind in kinds:
        pixels_BCHW = pixels_of(evaluation_scenes(num, kind), CPU)
        figures[f"PSNR, held-out {kind}s (dB)"] = psnr(pixels_BCHW, reconstruct(vae, pixels_BCHW))
        figures[f"PSNR of PCA with the same code size, held-out {kind}s (dB)"] = psnr(
            pixels_BCHW, pca_reconstruct(pixels_BCHW, fitted)
        )
    return figures


@torch.no_grad()
def clip_figures(clip: Any, tokenizer: Any, num: int = RETRIEVAL_TEXTS) -> Figures:
    """Return top-1 retrieval among ``num`` pairs, both directions, on held-out combinations and objects."""
    figures: Figures = {}
    kinds: tuple[HeldOut, ...] = ("combination", "object")
    for kind in kinds:
        scenes = evaluation_scenes(num, kind)
        ids = tokenize(tokenizer, [captions_of(scene)[0] for scene in scenes], CPU)
        pixels_BCHW = normalize_pixels(pixels_of(scenes, CPU), "imagenet")
        logits_BN = clip.eval()(input_ids=ids, pixel_values=pixels_BCHW).logits_per_image
        targets = torch.arange(num)
        for name, logits in (("caption of a picture", logits_BN), ("picture of a caption", logits_BN.T)):
            rate = float((logits.argmax(1) == targets).double().mean())
            figures[f"top-1 among {num}, {name}, held-out {kind}s"] = rate
    return figures


@torch.no_grad()
def judge_figures(judge: Any, pixels_BCHW: torch.Tensor, scenes: Sequence[Scene]) -> Figures:
    """Return how often a judge's first guess is one of the objects, and how often the place is right."""
    objects_BO, places_B = labels_of(scenes, CPU)
    parts = [judge(part) for part in torch.split(pixels_BCHW, 64)]
    objects, places = (torch.cat(part) for part in zip(*parts, strict=True))
    hits_B = objects_BO.gather(1, objects.argmax(1, keepdim=True))[:, 0] > 0
    return {
        "objects top-1": float(hits_B.double().mean()),
        "places top-1": float((places.argmax(1) == places_B).double().mean()),
    }


@torch.no_grad()
def draw(networks: Networks, tokenizer: Any, scenes: Sequence[Scene], cfg: float = DRAW_CFG) -> torch.Tensor:
    """Return pictures (B, 3, 64, 64) in [0, 1] drawn from the scenes' captions alone, DDIM with guidance ``cfg``."""
    scheduler = DDIMScheduler(**SCHEDULER_CONFIG)
    scheduler.set_timesteps(DRAW_STEPS)
    text_encoder = text_encoder_of(networks.clip)
    groups = [captions_of(scene) for scene in scenes]
    text_BLD = encode_mean(text_encoder, tokenizer, [*groups, *([("",)] * len(scenes))], CPU)
    seeds = [unit_seed(EVALUATION_SEED, "draw", number) for number in range(len(scenes))]
    noises = [
        np.random.Generator(np.random.PCG64(seed)).standard_normal((4, LATENT_SIZE, LATENT_SIZE)) for seed in seeds
    ]
    latents_BCHW = torch.from_numpy(np.stack(noises)).float()
    for time in scheduler.timesteps:
        noise = networks.unet(torch.cat([latents_BCHW] * 2), time, encoder_hidden_states=text_BLD).sample
        conditional, empty = noise.chunk(2)
        latents_BCHW = scheduler.step(empty + cfg * (conditional - empty), time, latents_BCHW).prev_sample
    decoded = networks.vae.decode(latents_BCHW / networks.vae.config.scaling_factor).sample
    return _to_unit(decoded)


def unet_figures(networks: Networks, tokenizer: Any, num: int) -> Figures:
    """Return how often judges see the asked object and place in pictures drawn from captions, and in real pictures.

    Drawn pictures are made once for every scale of classifier-free guidance, from the same captions and noise.
    """
    scenes = [training_scene(EVALUATION_SEED, 1, row) for row in range(num)]
    shown = {f"drawn at cfg {cfg:g}": draw(networks, tokenizer, scenes, cfg) for cfg in CFG_SCALES}
    shown["real"] = pixels_of(scenes, CPU)
    figures: Figures = {}
    for name in ("objects top-1", "places top-1"):
        for source, pixels in shown.items():
            rates = [judge_figures(judge, pixels, scenes)[name] for judge in networks.judges.values()]
            figures[f"{name}, pictures {source}, mean over judges"] = float(np.mean(rates))
    return figures


def contact_sheet(networks: Networks, tokenizer: Any, columns: int = 12) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an RGB sheet: pictures, their VAE reconstructions, and pictures drawn from their captions, row by row."""
    scenes = [*evaluation_scenes(columns, "no"), *evaluation_scenes(columns, "combination")]
    pixels = pixels_of(scenes, CPU)
    blocks = [pixels, reconstruct(networks.vae, pixels), draw(networks, tokenizer, scenes)]
    rows = [block[start : start + columns] for start in (0, columns) for block in blocks]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return (sheet.permute(1, 2, 0) * 255).round().byte().numpy()
