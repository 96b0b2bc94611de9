"""One rank of `nd evaluate`: take work until every test image is reconstructed and scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from launch.ranks.networks import meet
from launch.ranks.rank import Rank, refuse_to_run
from launch.supervise.decoder import decoder_dir
from nd_dist.config import Config
from nd_dist.config.data import OWN_SPLIT
from nd_dist.evaluation.generalisation import TRAINED
from nd_dist.evaluation.job import Job
from nd_dist.evaluation.points.units import Point, config_points, control_points, recipe_point
from nd_dist.evaluation.reconstruction.networks import Networks
from nd_dist.evaluation.run import evaluate
from nd_dist.evaluation.scoring.groups import read_groups
from nd_dist.evaluation.scoring.kinds import SEEN
from nd_dist.schema import Split
from nd_dist.training.records import model_dir, ridge_dir
from shards.format.codec import PICTURES
from shards.format.index import Index
from shards.format.splits import image_groups, open_index, split_sizes
from shards.reading.reader import ShardReader
from shards.sources.classes import read_classes


def make_job(rank: Rank, points: tuple[Point, ...], split: Split = "test") -> Job:
    """Return the evaluation of some points on test images, or on training images that training left out."""
    config = rank.config
    reader = ShardReader.over(open_index(config))
    sources = {name: feature.source for name, feature in reader.index.features.items()}
    absent, evaluation = dict[str, str](), config.evaluation
    groups = image_groups(reader.index) if evaluation.image_groups is None else read_groups(evaluation.image_groups)
    classes = evaluation.image_classes
    needing = ["control nearest"] if any(point.control == "nearest" for point in points) else []
    needing += [*([SEEN] if classes else []), *([TRAINED] if groups else [])]
    if needing and reader.without_picture(config.evaluated_subjects, "train"):
        absent = dict.fromkeys(
            needing, "the shards hold no pictures of training images (data.pictures=all packs them)"
        )
        points = tuple(point for point in points if point.control != "nearest")
    ridge = model_dir(ridge_dir(config.run_dir), "last")
    if config.fits_ridge_beside and (ridge / "config.json").is_file() and any(not point.is_plain for point in points):
        points = (*points, dataclasses.replace(recipe_point(config), control="ridge"))
    return Job(
        config=config,
        points=points,
        source=reader,
        decoder_dir=decoder_dir(config),
        ridge_dir=ridge,
        networks=Networks(config, rank.use_device(), config.evaluation.judges_dir, sources),
        split=split,
        heldout=_heldout_images(config, reader) if split == "train" else {},
        absent=absent,
        image_groups=groups if split == "test" else {},
        image_classes=read_classes(config.nsd_root, classes) if classes is not None else {},
        training_images=_training_images(config, reader),
        content_id=_content_id(config, reader.index),
        is_simulated=reader.index.is_simulated,
        subject_names={subject: info.name for subject, info in reader.index.subjects.items() if info.name},
        departures=tuple(_departures(config, reader.index)),
    )


def _content_id(config: Config, index: Index) -> str:
    """Return a hash of what an evaluation may read, which stays when other stores are packed."""
    stores = [name for name in (*config.training.targets, PICTURES) if name in index.features]
    return index.content_id([subject for subject in config.data.subjects if subject in index.subjects], stores)


def _departures(config: Config, index: Index) -> Iterator[str]:
    """Yield what these shards are otherwise than the whole data set."""
    split = config.data.split
    if split != OWN_SPLIT:
        together = ", ".join(map(str, config.data.subjects))
        yield f"split {split} for subjects {together} together; z-scored as packed, by the data set's own split"
    for subject in config.evaluated_subjects:
        info = index.subjects[subject]
        wanted, found = split_sizes(index, split, subject)
        if found < wanted:
            yield f"restricted test set: {found} of {wanted} images that {split} tests of subject {subject} are packed"
        if split == OWN_SPLIT and info.shown_test_images is not None and info.test_images < info.shown_test_images:
            yield (
                f"restricted test set: {info.test_images} of the {info.shown_test_images} test images that subject "
                f"{subject} saw are packed; published numbers are over all of them"
            )
    if index.accepted:
        yield f"{len(index.accepted)} samples cannot be real data and were packed knowingly (data.accept)"
    if index.is_simulated is None:
        yield "an earlier version packed the shards, which do not state whether the data are simulated"


def _training_images(config: Config, reader: ShardReader) -> tuple[int, ...]:
    """Return the training images of all packed subjects of the recipe, ascending."""
    subjects = [subject for subject in config.data.subjects if subject in reader.index.subjects]
    return tuple(sorted({image_id for subject in subjects for image_id in reader.images(subject, "train")}))


def _heldout_images(config: Config, reader: ShardReader) -> dict[int, list[int]]:
    """Return subject -> training images that were left out of training; empty where all were trained on."""
    fraction = config.training.heldout_fraction
    found = {subject: reader.heldout_images(subject, fraction) for subject in config.evaluated_subjects}
    return {subject: ids for subject, ids in found.items() if ids}


def work(rank: Rank) -> None:
    """Reconstruct with and without guidance, and the controls where asked for."""
    job = make_job(rank, (*config_points(rank.config), *control_points(rank.config)))
    evaluate(job, meet(rank, job.networks.device), rank.events, rank.should_stop)


if __name__ == "__main__":  # `deepspeed --module` would take a module that does nothing for a success
    refuse_to_run("launch.ranks.evaluate")
