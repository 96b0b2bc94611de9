"""Judge pictures on disk: per-image metrics that need no other image, and the features for those that do.

Reads the PNG files back, so what is scored is what anyone can open. Legend: R repeats, C = 3 channels, H height, W
width, D feature values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nd_dist.errors import DataError
from nd_dist.evaluation.layout import FEATURES, PICTURE, repeat_file
from nd_dist.evaluation.records import publish, read_png, read_record, write_staged
from nd_dist.files import sha256_file
from nd_dist.frozen.judges import Judge, PairJudge
from nd_dist.frozen.resize import pictures_to_pixels
from nd_dist.metrics.agreement import repeat_agreement
from nd_dist.metrics.pixel import PictureSet
from nd_dist.metrics.protocols import Protocol


@dataclass(frozen=True)
class Judges:
    """The metric networks: those whose features are kept, and those that compare pairs."""

    features: Sequence[Judge]
    pairs: Sequence[PairJudge] = ()


def judge_original(
    folder: Path, fingerprint: str, original: Path, protocol: Protocol, judges: Sequence[Judge]
) -> bool:
    """Publish the judges' features of a picture that was seen; False where another rank was first.

    Args:
        folder: The image's folder among the judged originals.
        fingerprint: Of picture, protocol and judges.
        original: Folder with the picture.
        protocol: Sizes.
        judges: The metric networks.
    """
    pixels_1CHW = protocol.original_first(pictures_to_pixels(read_png(original / PICTURE)[None]))
    features = features_of(pixels_1CHW, judges)
    return publish(folder, fingerprint, {}, lambda staging: write_staged(staging / FEATURES, features))


def judge_image(
    folder: Path,
    fingerprint: str,
    reconstructions: Path,
    original: Path,
    protocol: Protocol,
    judges: Judges,
) -> bool:
    """Publish metrics and features of one image's reconstructions; False where another rank was first.

    Args:
        folder: The image's folder among the judged ones.
        fingerprint: Of pictures, protocol and judges.
        reconstructions: Folder with the image's repeats.
        original: Folder with the picture that was seen.
        protocol: Sizes and kinds.
        judges: The metric networks.
    """
    recons_RCHW = protocol.recon_first(pictures_to_pixels(read_repeats(reconstructions)))
    original_1CHW = protocol.original_first(pictures_to_pixels(read_png(original / PICTURE)[None]))
    facts = {"metrics": pair_metrics(recons_RCHW, original_1CHW, protocol, judges.pairs)}
    features = features_of(recons_RCHW, judges.features)
    return publish(folder, fingerprint, facts, lambda staging: write_staged(staging / FEATURES, features))


def pair_metrics(
    recons_RCHW: Tensor, original_1CHW: Tensor, protocol: Protocol, pair_judges: Sequence[PairJudge] = ()
) -> dict[str, Any]:
    """Return PixCorr, SSIM and LPIPS of each repeat, and the agreement of the repeats, as JSON numbers.

    Args:
        recons_RCHW: Reconstructions of one image after the protocol's first resize, in [0,1].
        original_1CHW: The picture that was seen, likewise.
        protocol: Sizes and kind of SSIM.
        pair_judges: Networks that compare pairs (LPIPS).
    """
    originals = protocol.original_pixels(original_1CHW)
    resize = protocol.recon_pixels
    # size None: the original decides
    target = resize if resize.size is not None else dataclasses.replace(resize, size=originals.shape[-1])
    recons = target(recons_RCHW)
    if recons.shape[-2:] != originals.shape[-2:]:
        raise DataError(
            "A picture is not square or not of the size that the metric protocol expects.",
            expected=tuple(recons.shape[-2:]),
            found=tuple(originals.shape[-2:]),
            todo="choose a protocol that resizes the originals, e.g. evaluation.protocol=mindeye2",
        )
    num_repeats = len(recons)
    pictures = PictureSet(torch.cat([recons, originals]), protocol.ssim)  # the last one is the original
    metrics: dict[str, Any] = {
        "pixcorr": [pictures.correlation(repeat, num_repeats) for repeat in range(num_repeats)],
        "ssim": [pictures.similarity(repeat, num_repeats) for repeat in range(num_repeats)],
    }
    seen = originals.expand_as(recons)
    metrics |= {judge.name: judge.distances(recons, seen).tolist() for judge in pair_judges}
    if num_repeats > 1:
        metrics["repeat_pixcorr"] = repeat_agreement(num_repeats, pictures.correlation)
        metrics["repeat_ssim"] = repeat_agreement(num_repeats, pictures.similarity)
    return metrics


def features_of(pixels_BCHW: Tensor, judges: Sequence[Judge]) -> Mapping[str, Tensor]:
    """Return every judge's features (B, D) float32, by the judge's name.

    A judge-less evaluation still writes a (tiny) file, so that every judged image looks alike on disk.
    """
    features = {judge.name: judge.features(pixels_BCHW).float().flatten(1).contiguous() for judge in judges}
    return features or {"none": torch.zeros(len(pixels_BCHW), 1)}


def read_repeats(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the reconstructions of one image (R, H, W, 3) after comparing each file with its recorded hash.

    Raises:
        DataError: a file is missing, damaged or not the one that was recorded.
    """
    pictures = []
    files = read_record(folder)["files"]
    for name, digest in ((repeat_file(repeat), files[repeat_file(repeat)]) for repeat in range(len(files))):
        pictures.append(read_png(folder / name))
        if (found := sha256_file(folder / name)) != digest:
            raise DataError(
                "A reconstruction on disk is not the one that was recorded.",
                where=str(folder / name),
                expected=digest,
                found=found,
                todo=f"remove the folder {folder} and run the same command again",
            )
    return np.stack(pictures)
