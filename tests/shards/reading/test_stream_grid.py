"""The stream's promises over a grid of worlds, threads and subjects, with real shards and real reader threads."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nd_dist.schema import Batch
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream

SUBJECT_SETS = [(1,), (1, 2), (1, 2, 3)]  # subject 2 has fewer sessions than the others
QUOTA = 7  # items of a subject in a step
STEPS, RESUME = 5, 3
Row = tuple[int, ...]


def open_stream(folder: Path, **settings: object) -> TrialStream:
    return TrialStream(ShardReader(folder), StreamConfig(targets=("z",), seed=5, **settings))  # type: ignore[arg-type]


def rows_of(batch: Batch) -> dict[int, Row]:
    """Return global position -> what the row is and hashes of its bytes."""
    rows: dict[int, Row] = {}
    start: Counter[int] = Counter()
    for i, subject in enumerate(batch.subject.tolist()):
        voxels = batch.voxels[subject][start[subject]].numpy().tobytes()
        start[subject] += 1
        known = (batch.subject, batch.session, batch.trial, batch.image_id, batch.repeat)
        rows[int(batch.sample_id[i])] = (
            *(int(part[i]) for part in known),
            hash(voxels),
            hash(batch.targets["z"][i].numpy().tobytes()),
        )
    return rows


@lru_cache(maxsize=32)
def reference(folder: Path, subjects: tuple[int, ...], quota: int, repeats: str) -> list[dict[int, Row]]:
    with open_stream(folder, subjects=subjects, samples_per_subject=quota, threads=1, repeats=repeats) as stream:
        return [rows_of(batch) for batch in islice(stream, STEPS)]


@pytest.mark.parametrize("subjects", SUBJECT_SETS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("world", [*range(1, 10), 23])
def test_any_world_and_threads_give_the_same_global_steps_and_resume_anywhere_identically(
    packed_dir: Path, world: int, threads: int, subjects: tuple[int, ...]
) -> None:
    repeats = "mean" if (world + threads) % 3 == 0 else "trials"
    expected = reference(packed_dir, subjects, QUOTA, repeats)
    steps: list[dict[int, Row]] = [{} for _ in range(STEPS)]
    for rank in range(world):
        settings = {"subjects": subjects, "samples_per_subject": QUOTA, "repeats": repeats, "threads": threads}
        share = {"rank": rank, "world_size": world}
        with open_stream(packed_dir, **settings, **share) as stream:
            batches = list(islice(stream, RESUME))
            state = stream.state_dict()
        with open_stream(packed_dir, **settings, **share) as resumed:
            resumed.load_state_dict(state)
            batches += islice(resumed, STEPS - RESUME)
        assert [batch.step for batch in batches] == list(range(STEPS))
        for step, batch in zip(steps, batches, strict=True):
            rows = rows_of(batch)
            assert len(batch) == len(range(rank, len(subjects) * QUOTA, world)), "shares differ by one row at most"
            assert list(batch.voxels) == list(subjects), "also of subjects of which this rank has no row"
            assert not step.keys() & rows.keys(), "no row belongs to two ranks"
            step.update(rows)
    assert steps == expected


@pytest.mark.parametrize("other_world", [1, 2, 4, 5, 9, 120])
def test_a_state_of_one_world_goes_on_identically_in_another(packed_dir: Path, other_world: int) -> None:
    subjects, quota = (1, 2, 3), 36
    settings = {"subjects": subjects, "samples_per_subject": quota}
    expected = reference(packed_dir, subjects, quota, "trials")
    with open_stream(packed_dir, **settings, rank=2, world_size=3) as stream:
        list(islice(stream, 2))
        state = stream.state_dict()
    step: dict[int, Row] = {}
    for rank in range(other_world):
        with open_stream(packed_dir, **settings, rank=rank, world_size=other_world) as stream:
            stream.load_state_dict(state)
            step.update(rows_of(next(stream)))
    assert step == expected[2]


@pytest.mark.parametrize("repeats", ["trials", "mean"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_pass_of_every_subject_visits_every_item_once_over_all_ranks(
    packed_dir: Path, world: int, repeats: str
) -> None:
    key = "trial" if repeats == "trials" else "image_id"
    seen: dict[int, list[list[tuple[int, int]]]] = {1: [], 2: [], 3: []}
    for rank in range(world):
        settings = {"subjects": (1, 2, 3), "samples_per_subject": 6, "repeats": repeats}
        with open_stream(packed_dir, **settings, rank=rank, world_size=world) as stream:
            lengths = stream.num_items
            for step, batch in enumerate(islice(stream, 22)):
                for subject, steps in seen.items():
                    if len(steps) <= step:
                        steps.append([])
                    own = batch.subject == subject
                    steps[step] += zip(batch.sample_id[own].tolist(), getattr(batch, key)[own].tolist(), strict=True)
    for subject, steps in seen.items():
        items = [item for step in steps for _, item in sorted(step)]
        length = lengths[subject]
        assert len(items) >= length
        for start in range(0, len(items) - length + 1, length):
            assert len(set(items[start : start + length])) == length


def test_averaged_items_are_the_means_that_random_access_reads(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    for sessions in (None, (1, 3)):
        settings = {"subjects": (2, 1), "samples_per_subject": 7, "repeats": "mean", "sessions": sessions}
        with open_stream(packed_dir, **settings) as stream:
            batch = next(stream)
            for subject in (2, 1):
                ids = batch.image_id[batch.subject == subject].tolist()
                np.testing.assert_array_equal(batch.voxels[subject].numpy(), reader.voxels(subject, ids, sessions))
            assert stream.num_items == {s: len(reader.images(s, "train", sessions)) for s in (2, 1)}
        with open_stream(packed_dir, **settings, dtype="stored") as stored:
            as_stored = next(stored)
        assert as_stored.targets["z"].dtype == torch.float16
        assert as_stored.voxels[1].dtype == torch.float32, "a mean of halves is no half"
        assert torch.equal(as_stored.voxels[1], batch.voxels[1])
