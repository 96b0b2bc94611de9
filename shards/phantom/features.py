"""What simulated voxels respond to: Gabor energy, colour and contrast; a random network's features; what is shown.

None of it is the guidance CLIP, otherwise decoding and guidance would be circular. Plain NumPy, so that a phantom
depends on its seed only.

Shape suffixes: N pictures, C channels, H height, W width, F features, S pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from nd_dist.seeds import unit_seed
from shards.phantom.scenes import Scene

MAP_SIDE = 16
ORIENTATIONS = 4
FREQUENCIES = (0.06, 0.12, 0.24)  # cycles per pixel
CONV_CHANNELS = (24, 48, 96)
WORD_SIZE = 48
SUPER_CLASS_SHARE = 0.6
FEATURE_SEED = 7_301
"""Fixes the random network and the word vectors: all phantoms have the same kind of brain."""

CHUNK = 128  # pictures whose features are computed at a time

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PictureFeatures:
    """What all pictures are, for voxels to respond to.

    Args:
        early: (N, C, 256) early maps.
        network: (N, F) features of the random network.
        scene: (N, F) what the scenes mean.
    """

    early: Floats
    network: Floats
    scene: Floats


def picture_features(pictures_NHWC: npt.NDArray[np.uint8], scenes: Sequence[Scene]) -> PictureFeatures:
    """Return what voxels respond to, computed in chunks."""
    chunks = [pictures_NHWC[start : start + CHUNK] for start in range(0, len(pictures_NHWC), CHUNK)]
    return PictureFeatures(
        early=np.concatenate([early_maps(chunk) for chunk in chunks]),
        network=np.concatenate([network_features(chunk) for chunk in chunks]),
        scene=scene_features(scenes),
    )


def early_maps(pictures_NHWC: npt.NDArray[np.uint8]) -> Floats:
    """Return early visual maps (N, C, 16*16): luminance, two opponent colours, contrast, 12 Gabor energies.

    Args:
        pictures_NHWC: Pictures, 0..255, with sides divisible by 16.
    """
    pixels_NHWC = pictures_NHWC.astype(np.float32) / 255
    red, green, blue = (pixels_NHWC[..., channel] for channel in range(3))
    luminance = (red + green + blue) / 3
    contrast = np.abs(luminance - luminance.mean(axis=(1, 2), keepdims=True))
    spectrum = np.fft.fft2(luminance).astype(np.complex64)
    energies = [np.sqrt(np.abs(np.fft.ifft2(spectrum * response))) for response in _gabors(luminance.shape[1])]
    maps = [luminance, red - green, blue - (red + green) / 2, contrast, *energies]
    return np.stack([_shrink(channel).reshape(len(pixels_NHWC), -1) for channel in maps], axis=1).astype(np.float32)


@cache
def _gabors(side: int) -> tuple[Floats, ...]:
    """Return one-sided Gabor filters in the frequency domain (their response's modulus is the energy)."""
    v, u = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    filters = []
    for frequency in FREQUENCIES:
        for step in range(ORIENTATIONS):
            angle = np.pi * step / ORIENTATIONS
            squared = (u - frequency * np.cos(angle)) ** 2 + (v - frequency * np.sin(angle)) ** 2
            filters.append(np.exp(-squared / (2 * (frequency / 2) ** 2)).astype(np.float32))
    return tuple(filters)


def _shrink(maps_NHW: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return maps averaged over blocks to 16 x 16."""
    count, height, width = maps_NHW.shape
    blocks = maps_NHW.reshape(count, MAP_SIDE, height // MAP_SIDE, MAP_SIDE, width // MAP_SIDE)
    return np.asarray(blocks.mean(axis=(2, 4)))


def network_features(pictures_NHWC: npt.NDArray[np.uint8]) -> Floats:
    """Return features (N, F) of a fixed random network of three strided convolutions, pooled to 2 x 2."""
    values_NHWC = pictures_NHWC.astype(np.float32) / 127.5 - 1
    for layer, channels in enumerate(CONV_CHANNELS):
        values_NHWC = _convolve(values_NHWC, _weights(layer, values_NHWC.shape[3], channels))
    count, height, width, channels = values_NHWC.shape
    pooled = values_NHWC.reshape(count, 2, height // 2, 2, width // 2, channels).mean(axis=(2, 4))
    return np.asarray(pooled.reshape(count, -1), dtype=np.float32)


@cache
def _weights(layer: int, channels_in: int, channels_out: int) -> Floats:
    """Return a layer's random 3 x 3 weights, (channels_in * 9, channels_out)."""
    rng = np.random.Generator(np.random.PCG64(unit_seed(FEATURE_SEED, "layer", layer)))
    fan_in = channels_in * 9
    return np.asarray(rng.standard_normal((fan_in, channels_out)) * np.sqrt(2 / fan_in), dtype=np.float32)


def _convolve(values_NHWC: Floats, weights: Floats) -> Floats:
    """Return a 3 x 3 convolution of stride 2 with a rectifier."""
    padded = np.pad(values_NHWC, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    count, height, width = windows.shape[:3]
    flat = np.ascontiguousarray(windows).reshape(count * height * width, -1)
    return np.asarray(np.maximum(flat @ weights, 0).reshape(count, height, width, -1))


def scene_features(scenes: Sequence[Scene]) -> Floats:
    """Return what scenes mean (N, 2 * 48): the things, weighted by their size, and the place.

    A thing's vector is shared in part by its super-class, so an object that was never seen is not meaningless.
    """
    rows = []
    for scene in scenes:
        total = sum(thing.side for thing in scene.things)
        things = sum(
            thing.side / total * (SUPER_CLASS_SHARE * _word(thing.super_class) + 0.8 * _word(thing.name))
            for thing in scene.things
        )
        rows.append(np.concatenate([np.asarray(things), _word(scene.place)]))
    return np.array(rows, dtype=np.float32)


@cache
def _word(name: str) -> npt.NDArray[np.float64]:
    """Return the fixed random vector of a name, (48,)."""
    return np.random.Generator(np.random.PCG64(unit_seed(FEATURE_SEED, "word", name))).standard_normal(WORD_SIZE)
