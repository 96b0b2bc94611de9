"""Cases of the guidance loss: its value, gradient, features and weights on given pictures, in float64.

A picture ``NAME_u8`` comes with results ``NAME_{default,noaa}_{minus_loss,grad,gradnorm,feat_Linear-k}``: ``default``
resizes with antialias, ``noaa`` without. Gradients may be strided; their shape tells by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from nd_dist.conformance.networks import LAYER_SCALE, TARGET_NAMES, ReferenceWeights
from nd_dist.conformance.rows import DOUBLE, Case, Row, compare, isolated
from nd_dist.diffusion.clip_guidance import ClipGuidance, layer_weights, weighted_loss
from nd_dist.diffusion.guidance import ImageEstimate
from nd_dist.frozen.clip_vision import ClipVision, layer_name
from nd_dist.pixels import normalize_pixels, pictures_to_pixels, resize_bilinear

ANTIALIAS = {"default": True, "noaa": False}
STRETCHED_SIDE, STRETCH = 64, 1.3
"""Pictures of this side are taken out of [-1,1] by this factor in the layout, so that the clamp is active."""
SINGLE_TRANSFORM = 1e-5
"""The target transform runs in float32, pixel by pixel."""


def check(folder: Path) -> Iterator[Row]:
    """Yield the rows of every ``.npz`` of the folder."""
    for path in sorted(folder.glob("*.npz")):
        yield from isolated(path.name, _check_case(path))


def _check_case(path: Path) -> Iterator[Row]:
    case, clip = Case(path), ReferenceWeights(path.parent.parent / "weights").clip(torch.float64)
    pictures = [name.removesuffix("_u8") for name in case.names if name.endswith("_u8")]
    for picture in pictures:
        for kind in ANTIALIAS:
            yield from _check_picture(case, clip, picture, kind)
    yield from _check_weights(case)
    yield from _check_batch(case, clip)
    yield from _check_transform(case, clip)
    yield from case.left_over()


def _check_picture(case: Case, clip: ClipVision, picture: str, kind: str) -> Iterator[Row]:
    prefix = f"{picture}_{kind}_"
    if not any(name.startswith(prefix) for name in case.names):
        return
    bytes_CHW = case.tensor(f"{picture}_u8").double()
    image = (bytes_CHW / 127.5 - 1.0)[None] * (STRETCH if bytes_CHW.shape[-1] == STRETCHED_SIDE else 1.0)
    loss_B, gradient = _loss_and_gradient(case, clip, image, "target_", ANTIALIAS[kind])
    if f"{prefix}minus_loss" in case:
        yield compare(case.file, f"{prefix}minus_loss", -loss_B[0], case[f"{prefix}minus_loss"], DOUBLE)
    if f"{prefix}gradnorm" in case:
        yield compare(case.file, f"{prefix}gradnorm", gradient.norm(), case[f"{prefix}gradnorm"], DOUBLE)
    if f"{prefix}grad" in case:
        # the stored gradient is that of the released sign, minus the loss
        yield _compare_gradients(case, f"{prefix}grad", -gradient[0])
    with torch.no_grad():
        features = clip.features(((image + 1.0) / 2.0).clamp(0.0, 1.0), ANTIALIAS[kind])
    for name, feature in zip(TARGET_NAMES, features, strict=True):
        if f"{prefix}feat_{name}" in case:
            yield compare(case.file, f"{prefix}feat_{name}", feature.flatten(1), case[f"{prefix}feat_{name}"], DOUBLE)


def _compare_gradients(case: Case, name: str, gradient: torch.Tensor) -> Row:
    stride = gradient.shape[-1] // case[name].shape[-1]
    return compare(case.file, name, gradient[..., ::stride, ::stride], case[name], DOUBLE)


def _targets(case: Case, clip: ClipVision, prefix: str) -> dict[str, torch.Tensor]:
    return {
        layer_name(name): case.tensor(prefix + name).double().reshape(-1, *clip.feature_shape) for name in TARGET_NAMES
    }


def _loss_and_gradient(
    case: Case, clip: ClipVision, images_BCHW: torch.Tensor, prefix: str, antialias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image's loss (B,) and the gradient (B, 3, H, W) with respect to pixels of [-1,1]."""
    guidance = ClipGuidance(clip, LAYER_SCALE, antialias=antialias)
    prepared = guidance.prepare(_targets(case, clip, prefix))
    leaf = images_BCHW.clone().requires_grad_(True)
    loss_B = guidance.loss(ImageEstimate(leaf, decode=lambda pixels: pixels), prepared)
    (gradient,) = torch.autograd.grad(loss_B.sum(), leaf)
    return loss_B.detach(), gradient


def _check_weights(case: Case) -> Iterator[Row]:
    if not all(f"target_{name}" in case for name in TARGET_NAMES):
        return
    targets = [case.tensor(f"target_{name}").double() for name in TARGET_NAMES]
    norms_BK = torch.stack([target.flatten(1).norm(dim=1) for target in targets], dim=1)
    weights_BK = layer_weights(norms_BK, LAYER_SCALE)
    if "layer_weights" in case:
        yield compare(case.file, "layer_weights", weights_BK, case["layer_weights"], DOUBLE)
    if "mse_clip" in case:
        generated = [case.tensor(f"gen_{name}").double() for name in TARGET_NAMES]
        ours = weighted_loss(generated, targets, weights_BK)
        yield compare(case.file, "mse_clip", ours, case["mse_clip"], DOUBLE)


def _check_batch(case: Case, clip: ClipVision) -> Iterator[Row]:
    """Yield the rows of several samples at once; the references were made one by one."""
    if "batch_images" not in case:
        return
    images = case.tensor("batch_images").double()
    loss_B, gradient = _loss_and_gradient(case, clip, images, "batch_target_", antialias=True)
    if "batch_minus_loss" in case:
        yield compare(case.file, "batch_minus_loss", -loss_B, case["batch_minus_loss"], DOUBLE)
    if "batch_grads" in case:
        yield _compare_gradients(case, "batch_grads", -gradient)


def _check_transform(case: Case, clip: ClipVision) -> Iterator[Row]:
    """Yield the rows of the transform that makes targets: bytes, resize, pixel statistics."""
    for kind, name in (("default", "img2feat_tensor_every4"), ("noaa", "img2feat_tensor_noaa_every4")):
        if name in case and "img2feat_u8" in case:
            pixels = pictures_to_pixels(case["img2feat_u8"][None])
            resized = resize_bilinear(pixels, clip.image_size, ANTIALIAS[kind])
            normalized = normalize_pixels(resized, "imagenet")[0]
            stride = normalized.shape[-1] // case[name].shape[-1]
            yield compare(case.file, name, normalized[:, ::stride, ::stride], case[name], SINGLE_TRANSFORM)
