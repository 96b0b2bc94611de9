"""The images that a command looks at: whether the shards hold them, and their pictures where they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nd_dist.config import Config
from nd_dist.errors import ConfigError, DataError
from nd_dist.schema import INITIAL, Split

if TYPE_CHECKING:
    from shards.format.index import Index
    from shards.reading.reader import ShardReader


def check_test_images(config: Config, index: Index) -> str:
    """Refuse shards without the pictures that are compared with, and test images that a subject has not seen."""
    reader = _reader(index)
    for subject in (subject for subject in config.evaluated_subjects if subject in index.subjects):
        known = reader.images(subject, "test")
        if unknown := sorted(set(config.evaluation.image_ids or ()) - set(known)):
            raise ConfigError(
                f"Images are no test images of subject {subject}.",
                where="evaluation.image_ids",
                expected=f"some of {len(known)} ids, {known[0]} to {known[-1]}",
                found=", ".join(map(str, unknown)),
            )
        _require_pictures(config, reader, subject, "test", "an evaluation compares with them")
    return "packed"


def check_choice_images(config: Config, index: Index) -> str:
    """Refuse a sweep whose choice, which is made on training images, would have no pictures to compare with."""
    reader = _reader(index)
    for subject in (subject for subject in config.evaluated_subjects if subject in index.subjects):
        _require_pictures(config, reader, subject, "train", "a sweep chooses its point on them")
    return "packed"


def check_trained_images(config: Config, index: Index) -> str:
    """Refuse a stage that is left without images, or a teacher without pictures to look at."""
    from nd_dist.training.source import stage_request

    reader, training = _reader(index), config.training
    for stage in config.made_stages:
        request = stage_request(config, stage, 1)
        for subject in (subject for subject in request.subjects if subject in index.subjects):
            left_out = set(reader.heldout_images(subject, training.heldout_fraction))
            if not set(reader.images(subject, "train", request.sessions)) - left_out:
                raise ConfigError(
                    f"Stage {stage} has no image of subject {subject} to train on.",
                    where="training.heldout_fraction",
                    found=training.heldout_fraction,
                    todo="hold out fewer images",
                )
            if training.teacher and INITIAL in training.targets:
                _require_pictures(config, reader, subject, "train", "the teacher looks at them (training.teacher)")
    return "packed"


def _reader(index: Index) -> ShardReader:
    from shards.reading.reader import ShardReader

    return ShardReader.over(index)


def _require_pictures(config: Config, reader: ShardReader, subject: int, split: Split, why: str) -> None:
    """Refuse shards that lack a picture of a subject's images."""
    if missing := reader.without_picture([subject], split):
        kind = "test" if split == "test" else "training"
        raise DataError(
            f"The shards lack pictures of subject {subject}'s {kind} images; {why}.",
            where=str(config.shards_dir),
            found=f"{len(missing)} images without, e.g. {missing[0]}",
            todo="run `nd pack` with data.pictures=all (test: those of test images alone)",
        )
