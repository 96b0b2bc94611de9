"""Decoder predictions of a subject's images: made in fixed batches, kept on disk, read row by row.

All ranks read the same bytes, so no result depends on which rank decoded. A batch is a unit of work; z (and what else
the recipe names) is standardised when rows are read, with statistics that follow from all batches. Legend: N images, B
images of a batch, V voxels, C channels, H height, W width of the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from nd_dist.checkpoint import read_tensors
from nd_dist.compute.chunks import AdaptiveChunks
from nd_dist.errors import ConfigError
from nd_dist.evaluation.reconstruction.source import Source
from nd_dist.models.decoder import Decoder
from nd_dist.models.ridge import RidgeDecoder, load_decoder
from nd_dist.seeds import unit_seed

BATCH = 32  # fixed: a prediction's bits may depend on the batch it rides in, so this is not an option
PREDICTIONS = "predictions.safetensors"
STATISTICS = "statistics.safetensors"
SUMMARY = (".mean", ".spread")  # of a batch, beside its predictions
STATISTICS_FOLDER = "statistics"
STANDARD = (".mean", ".std", ".wanted_mean", ".wanted_std")  # of a target, over all batches

Float64 = npt.NDArray[np.float64]
CalibratedBy = Literal["element", "target"]


class ImageTargets(Protocol):
    """Targets of images, by name and image id."""

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return a target of each image, (N, *shape)."""
        ...


class StoredTargets:
    """Predictions of a subject on disk, batch by batch.

    Args:
        folder: Holds a folder of ``PREDICTIONS`` per batch, and the statistics that standardise them.
        image_ids: Images in the order in which they were decoded.
    """

    def __init__(self, folder: Path, image_ids: Sequence[int]) -> None:
        self._folder = folder
        self._row = {image_id: row for row, image_id in enumerate(image_ids)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The targets that were predicted."""
        with safe_open(self._folder / batch_name(0) / PREDICTIONS, framework="numpy") as content:
            return tuple(name for name in content.keys() if not name.endswith(SUMMARY))  # noqa: SIM118

    @cached_property
    def _statistics(self) -> dict[str, Float64]:
        return read_statistics(self._folder / STATISTICS_FOLDER)

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return predictions of a target; only these rows are read from disk.

        Raises:
            ConfigError: the decoder does not predict the target.
        """
        if name not in self.names:
            raise ConfigError(
                f"The decoder does not predict target {name}, which the sampler needs.",
                where=str(self._folder),
                expected="a decoder trained on c, z and all guidance layers",
                found=", ".join(self.names),
                todo="train with training.targets=[c,z,g02,g04,g06,g08,g10,g12]",
            )
        stored = np.stack([self._stored(name, *divmod(self._row[image_id], BATCH)) for image_id in image_ids])
        return calibrated(stored, name, self._statistics)

    def _stored(self, name: str, batch: int, row: int) -> npt.NDArray[np.float32]:
        with safe_open(self._folder / batch_name(batch) / PREDICTIONS, framework="numpy") as content:
            values: npt.NDArray[np.float32] = content.get_slice(name)[row]
        return values


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


class Predictor(Protocol):
    """A trained decoder: one target of some images at a time."""

    @property
    def names(self) -> tuple[str, ...]:
        """The targets that it predicts."""
        ...

    def predict(
        self, name: str, subject: int, voxels_BV: npt.NDArray[np.float32], seeds: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Return a target's predictions (B, *shape)."""
        ...


class DecoderFolder:
    """The decoder of a model folder, loaded on first use.

    Args:
        folder: The trained model.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._chunks = AdaptiveChunks("decoding", BATCH)

    @cached_property
    def _decoder(self) -> Decoder | RidgeDecoder:
        return load_decoder(self._folder).to(self._device).eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The targets that it predicts."""
        return tuple(spec.name for spec in self._decoder.targets)

    def predict(
        self, name: str, subject: int, voxels_BV: npt.NDArray[np.float32], seeds: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Return a target's predictions (B, *shape)."""
        voxels = torch.from_numpy(voxels_BV)

        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            return (self._decoder.predict(voxels[rows], subject, seeds[rows], only={name})[name],)

        (values,) = self._chunks.run(len(seeds), of_rows)
        return np.asarray(values.float().cpu().numpy(), dtype=np.float32)


def prediction_seeds(run_seed: int, subject: int, image_ids: Sequence[int]) -> list[int]:
    """Return the seed of each image's prediction (the prior samples)."""
    return [unit_seed(run_seed, "decode", subject, image_id) for image_id in image_ids]


def batches(image_ids: Sequence[int]) -> list[Sequence[int]]:
    """Return the ids in fixed batches."""
    return [image_ids[start : start + BATCH] for start in range(0, len(image_ids), BATCH)]


def batch_name(index: int, is_training: bool = False) -> str:
    """Return the folder of a batch: predictions of a split's images, or only statistics of training images."""
    return f"{'training' if is_training else 'images'}-{index:05d}"


class Summary(NamedTuple):
    """What the moments of many rows need of a batch: number of rows, mean, sum of squares around it (float64)."""

    num: int
    mean: Float64
    spread: Float64

    @staticmethod
    def of(values: npt.NDArray[np.float32]) -> Summary:
        """Return the summary of rows (B, *shape)."""
        rows = values.astype(np.float64)
        mean = rows.mean(axis=0)
        return Summary(len(rows), mean, ((rows - mean) ** 2).sum(axis=0))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return what a file keeps of the summary of a target."""
        return {name + key: torch.from_numpy(value) for key, value in zip(SUMMARY, self[1:], strict=True)}


class Moments:
    """Mean and population standard deviation of every element over rows, float64, streamed.

    Args:
        summaries: Of batches of rows.
    """

    def __init__(self, summaries: Iterable[Summary] = ()) -> None:
        self._num = 0
        self.mean: Float64 = np.zeros(())
        self._squares: Float64 = np.zeros(())
        for summary in summaries:
            self.add(summary)

    def add(self, more: Summary) -> None:
        """Count some more rows."""
        delta, total = more.mean - self.mean, self._num + more.num
        self._squares = self._squares + more.spread + delta**2 * self._num * more.num / total
        self.mean = self.mean + delta * more.num / total
        self._num = total

    def std(self, by: CalibratedBy = "element") -> Float64:
        """Return the population standard deviation of every element, or the root mean square (scalar) of all."""
        variance = self._squares / max(1, self._num)
        return np.asarray(np.sqrt(variance if by == "element" else variance.mean()))


def statistics_of(
    predicted: Mapping[str, Moments], wanted: Mapping[str, Moments], by: CalibratedBy
) -> dict[str, torch.Tensor]:
    """Return what standardises some targets, for the file that ``StoredTargets`` reads.

    Args:
        predicted: Target -> moments of its predictions.
        wanted: Target -> moments of training targets.
        by: Whether every element has a factor of its own, as published, or a target has one for all.
    """
    found: dict[str, torch.Tensor] = {}
    for name, own in predicted.items():
        values = (own.mean, own.std(by), wanted[name].mean, wanted[name].std(by))
        found |= {name + key: torch.from_numpy(value) for key, value in zip(STANDARD, values, strict=True)}
    return found


def read_statistics(folder: Path) -> dict[str, Float64]:
    """Return what a folder's ``STATISTICS`` standardises predictions with."""
    return {key: value.numpy() for key, value in read_tensors(folder / STATISTICS).items()}


def calibrated(
    values: npt.NDArray[np.float32], name: str, statistics: Mapping[str, Float64]
) -> npt.NDArray[np.float32]:
    """Return a target's predictions, standardised where there are statistics of it."""
    if name + STANDARD[0] not in statistics:
        return values
    return standardised(values, *(statistics[name + key] for key in STANDARD))


def standardised(
    values: npt.NDArray[np.float32], mean: Float64, std: Float64, wanted_mean: Float64, wanted_std: Float64
) -> npt.NDArray[np.float32]:
    """Return predictions with their mean replaced by the wanted one, and their deviation: by element, or one for all.

    Source: NeuralDiffuser's released scoring, z' = (z - mean_P) / std_P * std_Y + mean_Y. An element that all
    predictions share (std_P = 0, e.g. a single image) becomes mean_Y.
    """
    scale = np.divide(wanted_std, std, out=np.zeros_like(wanted_std), where=std > 0)
    return ((values.astype(np.float64) - mean) * scale + wanted_mean).astype(np.float32)
