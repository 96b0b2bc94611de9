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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nd_dist.checkpoint import read_tensors
from nd_dist.errors import DataError
from nd_dist.evaluation.points.layout import FEATURES, PICTURE, PIXELS, repeat_file
from nd_dist.fanout.results import Publisher, read_png, read_record, write_staged
from nd_dist.fanout.tasks import Steps
from nd_dist.files import sha256_file
from nd_dist.frozen.judges import Judge, PairJudge
from nd_dist.metrics.agreement import repeat_agreement
from nd_dist.metrics.pixel import Picture
from nd_dist.metrics.protocols import Protocol
from nd_dist.pixels import pictures_to_pixels

JUDGE_BATCH = 8

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judges:
    """The metric networks: those whose features are kept, and those that compare pairs."""

    features: Sequence[Judge]
    pairs: Sequence[PairJudge] = ()


@dataclass(frozen=True)
class Verdict:
    """Where the judgement of one image's pictures goes, and where those lie.

    Args:
        folder: Folder to publish.
        fingerprint: Of pictures, protocol and judges.
        original: Folder with the picture that was seen.
        reconstructions: Folder with the image's repeats; None where the original itself is judged.
    """

    folder: Path
    fingerprint: str
    original: Path
    reconstructions: Path | None = None


def judge_all(verdicts: Iterable[Verdict], protocol: Protocol, judges: Judges) -> Steps:
    """Publish features, and of reconstructions metrics too; a result that another rank published first stays.

    A step is one judgement. Closed between two of them, it has published what is judged by then.

    Args:
        verdicts: What to judge; those of one original follow each other, so that it is read once.
        protocol: Sizes and kinds.
        judges: The metric networks.
    """
    waiting: deque[tuple[Verdict, dict[str, Any]]] = deque()

    def prepared() -> Iterator[Tensor]:
        seen = _Seen(protocol)
        for verdict in verdicts:
            pixels_RCHW, facts = _prepare(verdict, seen, protocol, judges.pairs)
            waiting.append((verdict, facts))
            yield pixels_RCHW

    with Publisher() as publisher:
        for features in features_of(prepared(), judges.features):
            verdict, facts = waiting.popleft()
            for name, rows_RD in features.items():
                _check_finite(name, rows_RD, verdict)
            publisher.publish(verdict.folder, verdict.fingerprint, facts, _writer(features))
            yield


def _writer(features: Features) -> Callable[[Path], None]:
    return lambda staging: write_staged(staging / FEATURES, features)


class _Seen:
    """The pictures that were seen; the last one stays at hand, because all points of an image are compared with it.

    Args:
        protocol: Sizes and kind of SSIM.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._last: tuple[Path, Tensor, Original] | None = None

    def at(self, folder: Path) -> tuple[Tensor, Original]:
        """Return the picture in a folder after the first resize (1, C, H, W), and as it is compared."""
        if self._last is None or self._last[0] != folder:
            read = read_pixels(folder, lambda: read_png(folder / PICTURE)[None])
            pixels_1CHW = self._protocol.original_first(read)
            self._last = folder, pixels_1CHW, Original(pixels_1CHW, self._protocol)
        return self._last[1:]


class Original:
    """The picture that was seen, as it is compared with reconstructions.

    Args:
        first_1CHW: The picture after the protocol's first resize, in [0,1].
        protocol: Sizes and kind of SSIM.
    """

    def __init__(self, first_1CHW: Tensor, protocol: Protocol) -> None:
        self._first_1CHW, self._protocol = first_1CHW, protocol

    @cached_property
    def pixels_1CHW(self) -> Tensor:  # noqa: N802
        """The picture at the size of PixCorr and SSIM."""
        return self._protocol.original_pixels(self._first_1CHW)

    @cached_property
    def picture(self) -> Picture:
        """What PixCorr and SSIM need of it."""
        return Picture(self.pixels_1CHW[0], self._protocol.ssim)


def _prepare(
    verdict: Verdict, seen: _Seen, protocol: Protocol, pair_judges: Sequence[PairJudge]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the pixels that the judges get (R, C, H, W), and the facts of the record."""
    first_1CHW, original = seen.at(verdict.original)
    if verdict.reconstructions is None:
        return first_1CHW, {}
    folder = verdict.reconstructions
    read = read_pixels(folder, lambda: read_repeats(folder))
    recons_RCHW = protocol.recon_first(read.clamp(0, 1) if protocol.clamp else read)
    metrics = pair_metrics(recons_RCHW, original, protocol, pair_judges)
    for name, values in metrics.items():
        _check_finite(name, torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1), verdict)
    return recons_RCHW, {"metrics": metrics}


def pair_metrics(
    recons_RCHW: Tensor, original: Original, protocol: Protocol, pair_judges: Sequence[PairJudge] = ()
) -> dict[str, Any]:
    """Return PixCorr, SSIM and LPIPS of each repeat, and the agreement of the repeats, as JSON numbers.

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
        "pixcorr": [picture.correlation(original.picture) for picture in pictures],
        "ssim": [picture.similarity(original.picture) for picture in pictures],
    }
    seen = originals.expand_as(recons)
    metrics |= {judge.name: judge.distances(recons, seen).tolist() for judge in pair_judges}
    if len(pictures) > 1:
        metrics["repeat_pixcorr"] = repeat_agreement(pictures, Picture.correlation)
        metrics["repeat_ssim"] = repeat_agreement(pictures, Picture.similarity)
    return metrics


def features_of(sets: Iterable[Tensor], judges: Sequence[Judge]) -> Iterator[Features]:
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
                judged.extend(_batch_features(waiting, judges))
                waiting = []
            waiting.append(picture_CHW)
            if len(waiting) == JUDGE_BATCH:
                judged.extend(_batch_features(waiting, judges))
                waiting = []
        yield from finished()
    if waiting:
        judged.extend(_batch_features(waiting, judges))
    yield from finished()


def _batch_features(pictures: Sequence[Tensor], judges: Sequence[Judge]) -> list[Features]:
    """Return the features of each picture; a batch that is not full is filled up with its last picture.

    A judge-less evaluation still writes a (tiny) file, so that every judged image looks alike on disk.
    """
    pixels_BCHW = torch.stack([*pictures, *[pictures[-1]] * (JUDGE_BATCH - len(pictures))])
    features = {judge.name: judge.features(pixels_BCHW).float().flatten(1) for judge in judges}
    features = features or {"none": torch.zeros(JUDGE_BATCH, 1)}
    return [{name: rows_BD[row] for name, rows_BD in features.items()} for row in range(len(pictures))]


def _check_finite(judge: str, rows_RD: Tensor, verdict: Verdict) -> None:
    """Refuse what is no number: compared, it would count as a failure in silence."""
    is_finite_R = rows_RD.isfinite().all(dim=1)
    if not bool(is_finite_R.all()):
        raise DataError(
            f"The judge {judge} gives NaN or infinity.",
            where=f"{verdict.reconstructions or verdict.original}, repeat {int((~is_finite_R).nonzero()[0, 0])}",
            todo="look at the picture and at the judge's weights",
        )


def read_pixels(folder: Path, read: Callable[[], npt.NDArray[np.uint8]]) -> Tensor:
    """Return pixels (R, C, H, W) of [0,1] of a folder: the floats that were handed in, or what ``read`` reads."""
    if (folder / PIXELS).exists():
        return read_tensors(folder / PIXELS)["pixels"]
    return pictures_to_pixels(read())


def read_repeats(folder: Path) -> npt.NDArray[np.uint8]:
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
