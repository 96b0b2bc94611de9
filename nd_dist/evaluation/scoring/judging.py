"""Judge pictures on disk: per-image metrics that need no other image, and the features for those that do.

Reads the PNG files back, so what is scored is what anyone can open. Pictures run through the metric networks in
batches of one fixed size, whatever unit, repeat or rank they belong to: a network's last bits depend on the shape of
its batch, but not on a picture's neighbours in it. Legend: R repeats, C = 3 channels, H height, W width, D feature
values.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nd_dist.checkpoint import read_tensors
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import FEATURES, PICTURE, PIXELS, repeat_file
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.fanout.results import publish, read_png, read_record, write_staged
from nd_dist.fanout.tasks import Steps
from nd_dist.files import sha256_file
from nd_dist.frozen.judges import Judge, PairJudge
from nd_dist.metrics.agreement import repeat_agreement
from nd_dist.metrics.pixel import Picture
from nd_dist.metrics.protocols import Protocol
from nd_dist.metrics.table import COMPUTED
from nd_dist.pixels import pictures_to_pixels

BATCH = {"cpu": 8, "cuda": 32}  # pictures in a batch, by the kind of device: what fills it
MOST_SEEN = 16  # originals in memory at a time
READ_AT_ONCE = 64  # pictures of a source

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judges:
    """The metric networks: those whose features are kept, those that compare pairs, and where they run."""

    features: Sequence[Judge]
    pairs: Sequence[PairJudge] = ()
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a value


@dataclass(frozen=True)
class Verdict:
    """Where the judgement of some images' pictures goes, and where those lie.

    Args:
        folder: Folder to publish.
        fingerprint: Of pictures, protocol and judges.
        images: Image id -> folder with the picture that was seen.
        reconstructions: Image id -> folder with its repeats; empty where the originals themselves are judged.
        num_repeats: How many repeats of an image count.
    """

    folder: Path
    fingerprint: str
    images: Mapping[int, Path]
    reconstructions: Mapping[int, Path] = field(default_factory=dict)
    num_repeats: int = 1

    def place(self, image_id: int) -> Path:
        """Return where the judged pictures of an image lie."""
        return self.reconstructions.get(image_id, self.images[image_id])


def judge_all(verdicts: Iterable[Verdict], protocol: Protocol, judges: Judges) -> Steps:
    """Publish features, and of reconstructions metrics too; a result that another rank published first stays.

    A step is one image. Features are stored (R, N, D) by judge, so that those of a repeat lie together.

    Args:
        verdicts: What to judge.
        protocol: Sizes and kinds.
        judges: The metric networks.
    """
    waiting: deque[tuple[Verdict, int, dict[str, Any]]] = deque()
    device = judges.device

    def prepared() -> Iterator[Tensor]:
        seen = lru_cache(MOST_SEEN)(partial(Original, protocol=protocol))  # all points are compared with the same
        for verdict in verdicts:
            for image_id in verdict.images:
                pixels_RCHW, metrics = _prepare(
                    verdict, image_id, seen(verdict.images[image_id]), protocol, judges.pairs
                )
                waiting.append((verdict, image_id, metrics))
                yield pixels_RCHW

    sheet: list[tuple[Features, dict[str, Any]]] = []
    for features in features_of(prepared(), judges.features, BATCH.get(device.type, BATCH["cpu"])):
        verdict, image_id, metrics = waiting.popleft()
        for name, rows_RD in features.items():
            _check_finite(name, rows_RD, verdict.place(image_id))
        sheet.append((features, metrics))
        if len(sheet) == len(verdict.images):
            _publish(verdict, sheet)
            sheet = []
        yield


def _publish(verdict: Verdict, sheet: Sequence[tuple[Features, dict[str, Any]]]) -> None:
    """Publish what was found of a verdict's images."""
    kept = {name: torch.stack([features[name] for features, _ in sheet], dim=1) for name in sheet[0][0]}
    metrics = {name: [found[name] for _, found in sheet] for name in sheet[0][1]}
    facts = {"image_ids": list(verdict.images), "metrics": metrics}
    publish(verdict.folder, verdict.fingerprint, facts, lambda staging: write_staged(staging / FEATURES, kept))


class Original:
    """The picture that was seen, as it is compared with reconstructions.

    Args:
        folder: Where it lies.
        protocol: Sizes and kind of SSIM.
    """

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self._folder, self._protocol = folder, protocol

    @cached_property
    def first_1CHW(self) -> Tensor:  # noqa: N802
        """The picture after the protocol's first resize, in [0,1]."""
        return self._protocol.original_first(read_pixels(self._folder, lambda: read_png(self._folder / PICTURE)[None]))

    @cached_property
    def pixels_1CHW(self) -> Tensor:  # noqa: N802
        """The picture at the size of PixCorr and SSIM."""
        return self._protocol.original_pixels(self.first_1CHW)

    @cached_property
    def picture(self) -> Picture:
        """What PixCorr and SSIM need of it."""
        return Picture(self.pixels_1CHW[0], self._protocol.ssim)


def _prepare(
    verdict: Verdict, image_id: int, original: Original, protocol: Protocol, pair_judges: Sequence[PairJudge]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the pixels that the judges get (R, C, H, W), and the metrics of the pairs."""
    if not verdict.reconstructions:
        return original.first_1CHW, {}
    folder = verdict.place(image_id)
    read = read_pixels(folder, lambda: read_repeats(folder, verdict.num_repeats))
    recons_RCHW = protocol.recon_first(read.clamp(0, 1) if protocol.clamp else read)
    metrics = pair_metrics(recons_RCHW, original, protocol, pair_judges)
    for name, values in metrics.items():
        _check_finite(name, torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1), folder)
    return recons_RCHW, metrics


def pair_metrics(
    recons_RCHW: Tensor, original: Original, protocol: Protocol, pair_judges: Sequence[PairJudge] = ()
) -> dict[str, Any]:
    """Return PixCorr, SSIM, LPIPS and what else is registered of each repeat, and their agreement, as JSON numbers.

    Args:
        recons_RCHW: Reconstructions of one image after the protocol's first resize, in [0,1].
        original: The picture that was seen.
        protocol: Sizes and kind of SSIM.
        pair_judges: Networks that compare pairs (LPIPS).
    """
    resize, originals = protocol.recon_pixels, original.pixels_1CHW
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
    pictures = [Picture(recon_CHW, protocol.ssim) for recon_CHW in recons]
    metrics: dict[str, Any] = {
        name: [function(picture, original.picture) for picture in pictures] for name, function in COMPUTED.items()
    }
    if pair_judges:
        sides = recons.contiguous(), originals.expand_as(recons).contiguous()
        metrics |= {judge.name: judge.distances(*sides).tolist() for judge in pair_judges}
    if len(pictures) > 1:
        metrics["repeat_pixcorr"] = repeat_agreement(pictures, Picture.correlation)
        metrics["repeat_ssim"] = repeat_agreement(pictures, Picture.similarity)
    return metrics


def seen_features(source: Source, image_ids: Sequence[int], judge: Judge, protocol: Protocol) -> Iterator[Tensor]:
    """Yield a judge's features (B, D) of pictures that were seen, some at a time."""
    for start in range(0, len(image_ids), READ_AT_ONCE):
        pixels_BCHW = pictures_to_pixels(source.pictures(image_ids[start : start + READ_AT_ONCE]))
        for features in features_of([protocol.original_first(pixels_BCHW)], [judge]):
            yield features[judge.name]


def features_of(sets: Iterable[Tensor], judges: Sequence[Judge], batch: int = BATCH["cpu"]) -> Iterator[Features]:
    """Yield of each set of pictures (R, C, H, W) every judge's features (R, D) float32, by the judge's name.

    Sets are taken one by one as batches fill up; a result comes as soon as the last picture of its set is judged.
    """
    waiting: list[Tensor] = []
    judged: deque[Features] = deque()
    sizes: deque[int] = deque()

    def finished() -> Iterator[Features]:
        while sizes and len(judged) >= sizes[0]:
            rows = [judged.popleft() for _ in range(sizes.popleft())]
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    for pictures_RCHW in sets:
        sizes.append(len(pictures_RCHW))
        for picture_CHW in pictures_RCHW:
            if waiting and waiting[0].shape != picture_CHW.shape:
                judged.extend(_batch_features(waiting, judges, batch))
                waiting = []
            waiting.append(picture_CHW)
            if len(waiting) == batch:
                judged.extend(_batch_features(waiting, judges, batch))
                waiting = []
        yield from finished()
    if waiting:
        judged.extend(_batch_features(waiting, judges, batch))
    yield from finished()


def _batch_features(pictures: Sequence[Tensor], judges: Sequence[Judge], batch: int) -> list[Features]:
    """Return the features of each picture; a batch that is not full is filled up with its last picture.

    A judge-less evaluation still writes a (tiny) file, so that all judged images look alike on disk.
    """
    pixels_BCHW = torch.stack([*pictures, *[pictures[-1]] * (batch - len(pictures))]).contiguous()
    features = {judge.name: judge.features(pixels_BCHW).float().flatten(1) for judge in judges}
    features = features or {"none": torch.zeros(batch, 1)}
    return [{name: rows_BD[row] for name, rows_BD in features.items()} for row in range(len(pictures))]


def _check_finite(judge: str, rows_RD: Tensor, place: Path) -> None:
    """Refuse what is no number: compared, it would count as a failure in silence."""
    is_finite_R = rows_RD.isfinite().all(dim=1)
    if not bool(is_finite_R.all()):
        raise DataError(
            f"The judge {judge} gives NaN or infinity.",
            where=f"{place}, repeat {int((~is_finite_R).nonzero()[0, 0])}",
            todo="look at the picture and at the judge's weights",
        )


def read_pixels(folder: Path, read: Callable[[], npt.NDArray[np.uint8]]) -> Tensor:
    """Return pixels (R, C, H, W) of [0,1] of a folder: the floats that were handed in, or what ``read`` reads."""
    if (folder / PIXELS).exists():
        return read_tensors(folder / PIXELS)["pixels"]
    return pictures_to_pixels(read(), torch.channels_last)


def read_repeats(folder: Path, num_repeats: int) -> npt.NDArray[np.uint8]:
    """Return the first reconstructions of one image (R, H, W, 3) after comparing each with its recorded hash.

    Raises:
        DataError: a file is missing, damaged or not the one that was recorded.
    """
    pictures = []
    files = read_record(folder)["files"]
    for name in map(repeat_file, range(num_repeats)):
        pictures.append(read_png(folder / name))
        if (found := sha256_file(folder / name)) != files[name]:
            raise DataError(
                "A reconstruction on disk is not the one that was recorded.",
                where=str(folder / name),
                expected=files[name],
                found=found,
                todo=f"remove the folder {folder} and run the same command again",
            )
    return np.stack(pictures)
