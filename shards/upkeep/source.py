"""Proves a data set before it is packed: every file that a recipe needs is read to its end, and its counts compared.

For the first person who has the data: what a reader expects of it is looked for in all of it. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from nd_dist.config import Config
from nd_dist.errors import DataError
from shards.format.splits import set_tables
from shards.packing import doubts
from shards.sources.contract import DatasetReader, SubjectDesign, image_sets
from shards.sources.known import KnownCounts, known_data_set
from shards.sources.open import open_reader


def verify_source(config: Config) -> Iterator[str]:
    """Yield everything that is wrong with a recipe's data set, a line each; nothing proves it sound.

    Raises:
        DataError: the data set as a whole cannot be read.
        ConfigError: there is no such reader.
    """
    reader = open_reader(config)
    set_tables(image_sets(reader), reader.num_images)
    seen = set()
    for subject in config.data.subjects:
        try:
            design = reader.design(subject)
        except DataError as error:
            yield f"subject {subject}: {error}"
            continue
        seen |= set(design.image_id[design.image_id >= 0].tolist())
        yield from _counts(reader, design)
        for session in design.sessions:
            yield from _session(reader, design, session)
    for image_id in sorted(seen):
        try:
            found = doubts.picture_doubts(reader.pictures([image_id]), [image_id])
        except DataError as error:
            found = [str(error)]
        yield from found


def _counts(reader: DatasetReader, design: SubjectDesign) -> Iterator[str]:
    """Yield how a subject differs from what is published of it."""
    known = known_data_set(reader.num_images, reader.source, design.source.get("roi"))
    tests = design.image_id[design.is_test]
    found = KnownCounts(
        sessions=len(design.sessions),
        trials=design.num_trials,
        images=len(np.unique(design.image_id)),
        test_images=len(np.unique(tests)),
        test_trials=len(tests),
        voxels=design.num_voxels,
    )
    if known is None or (expected := known.expected(design.subject, found)) is None:
        return
    for name, value in asdict(expected).items():
        if (count := getattr(found, name)) != value:
            yield f"subject {design.subject}: {count} {name} instead of {value} ({known.name}'s known counts)"


def _session(reader: DatasetReader, design: SubjectDesign, session: int) -> Iterator[str]:
    """Yield what cannot be read of a session, or cannot be real."""
    trials = design.trials_of(session)
    try:
        betas_TV = reader.read_session(design.subject, session)
    except DataError as error:
        yield f"subject {design.subject}, session {session}: {error}"
        return
    if betas_TV.shape != (shape := (len(trials), design.num_voxels)):
        yield f"subject {design.subject}, session {session}: betas {betas_TV.shape} instead of {shape}"
        return
    names = [doubts.trial_name(design.subject, session, trial) for trial in trials.tolist()]
    name = doubts.session_name(design.subject, session)
    for doubt in doubts.session_doubts(betas_TV, doubts.raw_checksums(betas_TV), names, name):
        kind, _, sample = doubt.partition(" ")
        yield f"{sample} cannot be real: {doubts.WORDS[kind]}"
