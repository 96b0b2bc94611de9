"""Decoder predictions of a subject's images: made once in fixed batches, kept on disk, read row by row.

All ranks read the same bytes, so no result depends on which rank decoded. Legend: N images, V voxels, C channels, H
height, W width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.errors import ConfigError
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.schema import INITIAL, TARGETS, Role, TwoRepeats, role_of
from nd_dist.seeds import unit_seed

BATCH = 32  # fixed: a prediction's bits may depend on the batch it rides in, so this is not an option

Predict = Callable[[npt.NDArray[np.float32], Sequence[int]], dict[str, npt.NDArray[np.float32]]]


class ImageTargets(Protocol):
    """Targets of images, by name and image id."""

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target of each image, (N, *shape)."""
        ...


class StoredTargets:
    """Predictions in a folder that ``write_predictions`` made.

    Args:
        folder: Holds one ``NAME.npy`` per target.
        image_ids: Images in the order of the rows.
    """

    def __init__(self, folder: Path, image_ids: Sequence[int]) -> None:
        self._folder = folder
        self._row = {image_id: row for row, image_id in enumerate(image_ids)}

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return predictions of a target; only these rows are read from disk."""
        path = self._folder / f"{name}.npy"
        if not path.exists():
            raise ConfigError(
                f"The decoder does not predict target {name}, which the sampler needs.",
                where=str(self._folder),
                expected="a decoder trained on c, z and all guidance layers",
                found=", ".join(sorted(item.stem for item in self._folder.glob("*.npy"))),
                todo="train with training.targets=[c,z,g02,g04,g06,g08,g10,g12]",
            )
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array(stored[[self._row[image_id] for image_id in image_ids]])


class TrueTargets:
    """The pictures' own targets: what decoding could reach at best (``embeddings=ground_truth``).

    Args:
        source: Where the targets are.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target of each image."""
        return self._source.targets(name, image_ids)


def prediction_seeds(run_seed: int, subject: int, image_ids: Sequence[int]) -> list[int]:
    """Return the seed of each image's prediction (the prior samples)."""
    return [unit_seed(run_seed, "decode", subject, image_id) for image_id in image_ids]


def write_predictions(
    folder: Path, predict: Predict, source: Source, subject: int, image_ids: Sequence[int], settings: DecodeSettings
) -> None:
    """Predict all targets of some images and write each as ``NAME.npy`` (N, *shape) float32, in batches.

    Args:
        folder: Where to.
        predict: (voxels (B, V), seeds) -> target name -> (B, *shape).
        source: Gives voxels, averaged over the repeats of an image first.
        subject: Whose voxels.
        image_ids: N images.
        settings: Seed of the run, and how two repeats are averaged.
    """
    stores: dict[str, np.memmap] = {}
    for batch in _batches(image_ids):
        voxels_BV = source.voxels(subject, batch, two_repeats=settings.two_repeats)
        predictions = predict(voxels_BV, prediction_seeds(settings.run_seed, subject, batch))
        start = image_ids.index(batch[0])
        for name, values in predictions.items():
            if name not in stores:
                shape = (len(image_ids), *values.shape[1:])
                stores[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
            stores[name][start : start + len(batch)] = values
    for store in stores.values():
        store.flush()


def calibrate(path: Path, predicted: Moments, wanted: Moments) -> None:
    """Standardise stored predictions of a target per element and give them the wanted mean and deviation, in place.

    Source: NeuralDiffuser's released scoring, z' = (z - mean_P) / std_P * std_Y + mean_Y. An element that all
    predictions share (std_P = 0, e.g. a single image) becomes mean_Y.
    """
    store = np.lib.format.open_memmap(path, mode="r+")
    scale = np.divide(wanted.std, predicted.std, out=np.zeros_like(wanted.std), where=predicted.std > 0)
    for row in range(len(store)):
        store[row] = (store[row].astype(np.float64) - predicted.mean) * scale + wanted.mean
    store.flush()


class Moments:
    """Mean and population standard deviation of every element over rows, float64, streamed.

    Args:
        batches: Arrays (B, *shape).
    """

    def __init__(self, batches: Iterable[npt.NDArray[np.float32]] = ()) -> None:
        self._count = 0
        self.mean: npt.NDArray[np.float64] = np.zeros(())
        self._squares: npt.NDArray[np.float64] = np.zeros(())
        for values in batches:
            self.add(values)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count some more rows (B, *shape)."""
        rows = values.astype(np.float64)
        delta = rows.mean(axis=0) - self.mean
        total = self._count + len(rows)
        spread = ((rows - rows.mean(axis=0)) ** 2).sum(axis=0)
        self._squares = self._squares + spread + delta**2 * self._count * len(rows) / total
        self.mean = self.mean + delta * len(rows) / total
        self._count = total

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Population standard deviation."""
        return np.asarray(np.sqrt(self._squares / max(1, self._count)))


def target_moments(source: Source, subject: int, name: str = INITIAL) -> Moments:
    """Return the statistics of a true target over the subject's training images."""
    ids = source.images(subject, "train")
    return Moments(source.targets(name, batch) for batch in _batches(ids))


def decode_subject(
    folder: Path, predict: Predict, source: Source, subject: int, image_ids: Sequence[int], settings: DecodeSettings
) -> None:
    """Write a subject's predictions into ``folder``, with z (and what else ``settings`` name) calibrated.

    ``test_set`` takes the statistics of the predictions themselves (as published: every image's z then depends on
    which images are decoded together, so always a whole split is). ``stored`` takes those of predictions for the
    subject's training images, so that an image can be decoded alone.
    """
    write_predictions(folder, predict, source, subject, image_ids, settings)
    if settings.z_calibration == "none":
        return
    chosen = [name for name in TARGETS if role_of(name) in settings.calibrated and (folder / f"{name}.npy").exists()]
    predicted = {name: Moments() for name in chosen}
    if settings.z_calibration == "test_set":
        for name, moments in predicted.items():
            stored = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for start in range(0, len(stored), BATCH):
                moments.add(np.array(stored[start : start + BATCH]))
    else:
        for batch in _batches(source.images(subject, "train")):
            seeds = prediction_seeds(settings.run_seed, subject, batch)
            voxels_BV = source.voxels(subject, batch, two_repeats=settings.two_repeats)
            predictions = predict(voxels_BV, seeds)
            for name, moments in predicted.items():
                moments.add(predictions[name])
    for name, moments in predicted.items():
        calibrate(folder / f"{name}.npy", moments, target_moments(source, subject, name))


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of a decoding.

    Args:
        z_calibration: Statistics that standardise predictions: ``test_set``, ``stored`` or ``none``.
        run_seed: Seed of the run.
        two_repeats: How the voxels of an image that was seen twice are averaged.
        calibrated: Roles of the targets that are standardised.
    """

    z_calibration: str
    run_seed: int
    two_repeats: TwoRepeats = "mean"
    calibrated: tuple[Role, ...] = ("initial",)


def decoder_predict(decoder_dir: Path, subject: int) -> Predict:
    """Return the prediction function of a trained decoder for one subject."""
    from nd_dist.models.decoder import Decoder

    decoder = Decoder.load(decoder_dir).eval()

    def predict(voxels_BV: npt.NDArray[np.float32], seeds: Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
        predictions: Mapping[str, torch.Tensor] = decoder.predict(torch.from_numpy(voxels_BV), subject, seeds)
        return {name: values.float().cpu().numpy() for name, values in predictions.items()}

    return predict


def _batches(image_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the ids in fixed batches."""
    return (image_ids[start : start + BATCH] for start in range(0, len(image_ids), BATCH))
