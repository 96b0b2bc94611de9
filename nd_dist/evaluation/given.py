"""Pictures and features made elsewhere, evaluated as if they had been made here: `nd score`.

They are the pictures of a single point without guidance. A phase before all others stores them, and everything that
follows finds them made. Legend: N images, R repeats, C = 3 channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nd_dist.config import Config, Scalar
from nd_dist.errors import ConfigError, DataError
from nd_dist.evaluation.bench import Bench
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.picture_sets import PictureSet, open_pictures, read_array
from nd_dist.evaluation.points.layout import ARRAYS, PICTURE, PIXELS, repeat_file
from nd_dist.evaluation.points.units import Point, subject_name
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.scoring.retrieved import retrieval_metrics
from nd_dist.fanout.results import publish, write_png, write_staged
from nd_dist.fanout.tasks import Steps, Task
from nd_dist.files import hash_json, sha256_file
from nd_dist.pixels import to_uint8
from nd_dist.schema import Split

THE_POINT = Point(0.0, 0.0)
CHUNK_IMAGES = 16


@dataclass(frozen=True)
class GivenFeatures:
    """Features that were handed in, an image a row."""

    content: Any  # an array or a tensor

    def rows(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return flattened features (N, D) of some images.

        Raises:
            DataError: a number is not finite.
        """
        rows = torch.as_tensor(np.asarray(self.content[list(image_ids)])).float().flatten(1).numpy()
        if not np.isfinite(rows).all():
            image_id = image_ids[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])]
            raise DataError(f"{name}: the features of image {image_id} are not finite.")
        return np.asarray(rows, dtype=np.float32)


@dataclass(frozen=True)
class GivenPictures:
    """A source of pictures that were handed in; image ids are positions among the originals.

    Args:
        originals: What was seen.
        recons: What was reconstructed, same order.
        features: Decoded and true features for retrieval, files of arrays; none: no retrieval.
    """

    originals: PictureSet
    recons: PictureSet
    features: tuple[Path, ...] = ()

    @classmethod
    def open(cls, config: Config) -> GivenPictures:
        """Return the pictures that a recipe's section ``score`` names.

        Raises:
            ConfigError: the section is not filled, or features of one side are missing.
            DataError: the pictures cannot be read or do not belong together.
        """
        given = config.score
        if given.originals is None or given.reconstructions is None:
            raise ConfigError("There is nothing to score.", where="score.originals, score.reconstructions")
        features = tuple(path for path in (given.brain_features, given.image_features) if path is not None)
        if len(features) == 1:
            raise ConfigError("Retrieval needs features of both sides.", where="score.brain_features, image_features")
        originals = open_pictures(given.originals)
        for path in features:
            if (found := len(read_array(path))) != len(originals.names):
                raise DataError(
                    "Features are not as many as originals.",
                    where=str(path),
                    expected=len(originals.names),
                    found=found,
                )
        if originals.num_repeats > 1:
            raise DataError("Originals have a second axis of repeats.", where=str(originals.place))
        return cls(originals, open_pictures(given.reconstructions, originals), features)

    @property
    def index(self) -> GivenPictures:
        """What tells it from other sources: itself."""
        return self

    @cached_property
    def id(self) -> str:
        """Hash of the originals."""
        return self.originals.content_id

    @cached_property
    def made_id(self) -> str:
        """Hash of what was made of them: reconstructions and features."""
        return hash_json([self.recons.content_id, *(sha256_file(path) for path in self.features)])

    def images(self, subject: int, split: Split) -> list[int]:
        """Return all images."""
        return list(range(len(self.originals.names)))

    def pictures(self, image_ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return originals (N, H, W, 3)."""
        return np.concatenate([to_uint8(self.originals.pixels(image_id)) for image_id in image_ids])

    def voxels(self, subject: int, image_ids: Sequence[int], *, two_repeats: str = "mean") -> npt.NDArray[np.float32]:
        """Refuse: there are none."""
        raise NotImplementedError

    def targets(self, name: str, image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Refuse: there are none."""
        raise NotImplementedError


@dataclass
class JudgesAlone(Networks):
    """The metric networks without those that make pictures.

    Args:
        given: The pictures.
    """

    given: GivenPictures | None = None

    def identity(self, config: Config) -> dict[str, str | bool]:
        """Return what stands for the networks that made the pictures: their hash."""
        return {"given pictures": self.given.made_id if self.given else ""}

    def _beside_model(self) -> Path | None:
        """Look beside no model."""
        return None


def given_job(config: Config, device: torch.device) -> Job:
    """Return the evaluation of what a recipe's section ``score`` names.

    Raises:
        ConfigError, DataError: see ``GivenPictures.open``.
    """
    source = GivenPictures.open(config)
    settings: dict[str, Scalar] = {
        "evaluation.num_repeats": source.recons.num_repeats,
        "evaluation.embeddings": "ground_truth",
        "sampler.kappa": 0.0,
        "sampler.eta": 0.0,
    }
    config = config.replaced(settings)
    networks = JudgesAlone(config, device, config.evaluation.judges_dir, given=source)
    names = () if source.features else ("image_retrieval", "brain_retrieval")
    absent = dict.fromkeys(names, "no features of brain and pictures were given")
    return Job(config, (THE_POINT,), source, Path(), networks, absent=absent, has_given_features=bool(source.features))


def given_tasks(bench: Bench) -> list[Task]:
    """Return the tasks that store what was handed in, and one for retrieval; mostly there are none."""
    source = bench.job.source
    if not isinstance(source, GivenPictures):
        return []
    ids = bench.job.all_images()
    chunks = [ids[start : start + CHUNK_IMAGES] for start in range(0, len(ids), CHUNK_IMAGES)]
    tasks = [_store_task(bench, source, number, chunk) for number, chunk in enumerate(chunks)]
    return [*tasks, *([_retrieval_task(bench, source)] if source.features else [])]


def _store_task(bench: Bench, source: GivenPictures, number: int, image_ids: Sequence[int]) -> Task:
    layout, keys, (subject,) = bench.job.layout, bench.keys, bench.job.subjects
    originals, made = keys.key("originals"), keys.key("pictures", THE_POINT, subject)
    wanted = [(layout.original_of(image), originals, source.originals, image) for image in image_ids]
    wanted += [(layout.pictures_of(THE_POINT, subject, image), made, source.recons, image) for image in image_ids]

    def is_done() -> bool:
        return all(bench.has(folder, key) for folder, key, _, _ in wanted)

    def work() -> Steps:
        for folder, key, pictures, image in wanted:
            if not bench.has(folder, key):
                _store(folder, key, pictures, image, is_original=pictures is source.originals)
            yield

    return Task(f"given_{number:05d}", is_done, work)


def _store(folder: Path, key: str, pictures: PictureSet, image_id: int, is_original: bool) -> None:
    """Publish an image's pictures as PNG; floats, which PNG would round, beside it as they are."""
    facts: dict[str, Any] = {"image_id": image_id, "name": pictures.names[image_id], "files": {}}

    def write(staging: Path) -> None:
        pixels_RCHW = pictures.pixels(image_id)
        for repeat, picture_HWC in enumerate(to_uint8(pixels_RCHW)):
            name = PICTURE if is_original else repeat_file(repeat)
            write_png(staging / name, picture_HWC)
            facts["files"][name] = sha256_file(staging / name)
        if pictures.has_floats:
            write_staged(staging / PIXELS, {"pixels": pixels_RCHW})

    publish(folder, key, facts, write)


def _retrieval_task(bench: Bench, source: GivenPictures) -> Task:
    job, (subject,) = bench.job, bench.job.subjects
    folder, key = job.layout.retrieval(THE_POINT, subject), bench.keys.key("score", THE_POINT, subject)

    def work() -> Steps:
        brain, image = (GivenFeatures(read_array(path)) for path in source.features)
        ids = job.images(subject)
        metrics, arrays = retrieval_metrics(brain, image, "given features", ids, bench.statistics)
        yield
        facts = {"metrics": metrics, "image_ids": list(ids)}
        publish(folder, key, facts, lambda staging: write_staged(staging / ARRAYS, arrays))

    return Task(f"retrieval_{subject_name(subject)}", lambda: bench.has(folder, key), work)
