from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nd_dist.errors import CheckpointError, ConfigError, DataError
from nd_dist.schema import Batch
from shards.format.codec import trial_shard_path
from shards.format.splits import is_heldout
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from tests.shards.support import flip_byte

SUBJECTS = (1, 2, 3)
QUOTA = 12


def make_stream(folder: Path, **changes: object) -> TrialStream:
    settings: dict[str, object] = {
        "subjects": SUBJECTS,
        "targets": ("z", "c"),
        "samples_per_subject": QUOTA,
        "seed": 5,
        **changes,
    }
    return TrialStream(ShardReader(folder), StreamConfig(**settings))  # type: ignore[arg-type]


def rows_of(batch: Batch) -> dict[int, tuple[object, ...]]:
    """Return global position -> everything that the row holds."""
    rows: dict[int, tuple[object, ...]] = {}
    start = dict.fromkeys(SUBJECTS, 0)
    for i, subject in enumerate(batch.subject.tolist()):
        voxels = batch.voxels[subject][start[subject]]
        start[subject] += 1
        rows[int(batch.sample_id[i])] = (
            *(int(part[i]) for part in (batch.subject, batch.session, batch.trial, batch.image_id, batch.repeat)),
            voxels.numpy().tobytes(),
            *(values[i].numpy().tobytes() for values in batch.targets.values()),
        )
    return rows


def global_steps(
    folder: Path, world: int, threads: int, first: int, count: int
) -> list[dict[int, tuple[object, ...]]]:
    """Return the global batches of some steps, put together from all ranks."""
    steps: list[dict[int, tuple[object, ...]]] = [{} for _ in range(count)]
    for rank in range(world):
        with make_stream(folder, rank=rank, world_size=world, threads=threads) as stream:
            if first:
                stream.load_state_dict({**stream.state_dict(), "step": first})
            for step, batch in zip(steps, stream, strict=False):
                rows = rows_of(batch)
                assert not step.keys() & rows.keys(), "no row belongs to two ranks"
                step.update(rows)
    return steps


@pytest.fixture(scope="module")
def reference(packed_dir: Path) -> list[dict[int, tuple[object, ...]]]:
    return global_steps(packed_dir, world=1, threads=1, first=0, count=12)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 5, 40])
def test_global_steps_are_equal_for_any_world_and_threads_and_after_resuming(
    packed_dir: Path, reference: list[dict[int, tuple[object, ...]]], world: int, threads: int
) -> None:
    assert global_steps(packed_dir, world, threads, first=0, count=6) == reference[:6]
    assert global_steps(packed_dir, world, threads, first=7, count=5) == reference[7:]


def test_every_pass_of_unequal_subjects_visits_every_trial_once(packed_dir: Path) -> None:
    with make_stream(packed_dir) as stream:
        lengths = stream.num_items
        assert len(set(lengths.values())) > 1
        seen: dict[int, list[int]] = {subject: [] for subject in SUBJECTS}
        for batch in islice(stream, 15):
            for subject in SUBJECTS:
                seen[subject] += batch.trial[batch.subject == subject].tolist()
    for subject, length in lengths.items():
        for start in range(0, len(seen[subject]) - length + 1, length):
            assert set(Counter(seen[subject][start : start + length]).values()) == {1}
            assert len(set(seen[subject][start : start + length])) == length


def test_a_row_holds_what_random_access_reads(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    with make_stream(packed_dir) as stream:
        batch = next(stream)
    assert len(batch) == 3 * QUOTA
    assert batch.sample_id.tolist() == list(range(3 * QUOTA))
    for name in ("z", "c"):
        assert batch.targets[name].dtype == torch.float32
        np.testing.assert_array_equal(batch.targets[name].numpy(), reader.targets(name, batch.image_id.tolist()))
    record = np.empty(reader.num_voxels[2], dtype="<f2")
    for row, voxels in zip(np.flatnonzero(batch.subject == 2), batch.voxels[2], strict=True):
        is_row = (reader.trials["subject"] == 2) & (reader.trials["trial"] == batch.trial[row])
        reader.read_voxels(reader.trials[is_row], record[None])
        np.testing.assert_array_equal(voxels.numpy(), record.astype(np.float32))


def test_batches_bring_their_pictures_where_they_are_asked_to(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    with make_stream(packed_dir, split="test", pictures=True, rank=1, world_size=5) as stream:
        batch = next(stream)
    assert batch.pictures is not None
    np.testing.assert_array_equal(batch.pictures.numpy(), reader.pictures(batch.image_id.tolist()))
    with make_stream(packed_dir) as stream:
        assert next(stream).pictures is None


def test_batches_that_are_kept_are_never_overwritten(packed_dir: Path) -> None:
    with make_stream(packed_dir, threads=3) as stream:
        kept = list(islice(stream, 10))
        before = [rows_of(batch) for batch in kept]
        for _ in islice(stream, 30):
            pass
        assert [rows_of(batch) for batch in kept] == before


def test_memory_is_used_again_when_batches_are_dropped(packed_dir: Path) -> None:
    with make_stream(packed_dir, threads=2) as stream:
        for _ in islice(stream, 50):
            pass
        batch = next(stream)
        size = sum(tensor.nbytes for tensor in (*batch.voxels.values(), *batch.targets.values()))
        assert stream._pool.num_free_bytes < 8 * size


def test_averaging_leaves_no_memory_of_every_number_of_trials(packed_dir: Path) -> None:
    with make_stream(packed_dir, repeats="mean", targets=(), threads=1) as stream:
        for _ in islice(stream, 50):
            pass
        assert len(stream._pool._free) <= len(SUBJECTS), "one size a subject"


def test_splits_are_disjoint_and_hold_out_by_image(packed_dir: Path) -> None:
    images: dict[str, set[int]] = {}
    for split in ("train", "heldout", "test"):
        with make_stream(packed_dir, split=split, heldout_fraction=0.3) as stream:
            images[split] = {i for batch in islice(stream, 10) for i in batch.image_id.tolist()}
    assert all(images.values())
    assert not images["train"] & images["heldout"]
    assert not images["test"] & (images["train"] | images["heldout"])
    reader = ShardReader(packed_dir)
    assert images["test"] == {i for subject in SUBJECTS for i in reader.images(subject, "test")}


def test_the_held_out_share_is_what_was_asked_for() -> None:
    ids = np.arange(73_000)
    assert is_heldout(ids, 0.05).mean() == pytest.approx(0.05, abs=0.003)
    assert not is_heldout(ids, 0.0).any()
    assert is_heldout(ids, 1.0).all()
    assert (is_heldout(ids, 0.1) >= is_heldout(ids, 0.05)).all()


def test_sessions_restrict_the_trials(packed_dir: Path) -> None:
    with make_stream(packed_dir, sessions=(2,)) as stream:
        assert {int(s) for batch in islice(stream, 4) for s in batch.session} == {2}


def test_stored_precision_can_be_asked_for(packed_dir: Path) -> None:
    with make_stream(packed_dir, dtype="stored") as stored, make_stream(packed_dir) as wide:
        half, single = next(stored), next(wide)
    assert half.voxels[1].dtype == half.targets["z"].dtype == torch.float16
    assert torch.equal(half.voxels[1].float(), single.voxels[1])


def test_the_state_is_json_and_the_same_on_every_rank(packed_dir: Path) -> None:
    states = []
    for rank in range(2):
        with make_stream(packed_dir, rank=rank, world_size=2, threads=rank + 1) as stream:
            for _ in islice(stream, 3):
                pass
            states.append(json.loads(json.dumps(stream.state_dict())))
    assert states[0] == states[1]
    assert states[0]["step"] == 3


def test_a_state_of_as_many_other_trials_is_refused(packed_dir: Path) -> None:
    hours = [make_stream(packed_dir, subjects=(1,), sessions=(session,)) for session in (1, 2, 3, 4)]
    alike = [(a, b) for a in hours for b in hours if a is not b and a.num_items == b.num_items]
    assert alike
    for one, other in alike:
        with pytest.raises(CheckpointError, match="where: trials"):
            other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"samples_per_subject": 6}, {"subjects": (1, 2)}, {"targets": ("z",)}, {"sessions": (1,)}]
)
def test_a_state_of_other_data_is_refused(packed_dir: Path, change: dict[str, object]) -> None:
    with make_stream(packed_dir) as stream, make_stream(packed_dir, **change) as other:
        if set(other.num_items) != set(stream.num_items) or change:
            with pytest.raises(CheckpointError, match="not the data of the checkpoint"):
                other.load_state_dict(stream.state_dict())


def test_a_damaged_sample_stops_the_stream_again_and_again_and_is_never_skipped(packed_copy: Path) -> None:
    reader = ShardReader(packed_copy)
    row = reader.trials[(reader.trials["subject"] == 1) & (reader.trials["split"] == 0)][0]
    path = packed_copy / trial_shard_path(1, int(row["session"]))
    flip_byte(path, int(row["offset"]))
    with make_stream(packed_copy, targets=(), subjects=(1,)) as stream:
        good = 0
        with pytest.raises(DataError, match="checksum"):
            for _ in stream:
                good += 1
        assert stream.step == good
        with pytest.raises(DataError, match=f"offset {int(row['offset'])}"):
            next(stream)
        flip_byte(path, int(row["offset"]))
        assert next(stream).step == good


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_stream_that_is_interrupted_goes_on_with_the_same_step(
    packed_dir: Path, reference: list[dict[int, tuple[object, ...]]], error: type[BaseException]
) -> None:
    with make_stream(packed_dir, threads=2) as stream:
        found = [rows_of(batch) for batch in islice(stream, 3)]
        right = stream._reader.files._read
        stream._reader.files._read = raising(error)  # type: ignore[method-assign]
        with pytest.raises(error):
            for batch in stream:
                found.append(rows_of(batch))
        stream._reader.files._read = right  # type: ignore[method-assign]
        assert stream.step == len(found)
        found += [rows_of(batch) for batch in islice(stream, 3)]
    assert found == reference[: len(found)]


def raising(error: type[BaseException]) -> Callable[..., None]:
    def read(*_: object) -> None:
        raise error

    return read


def test_a_closed_stream_ends_and_closing_twice_is_fine(packed_dir: Path) -> None:
    stream = make_stream(packed_dir)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


def test_settings_that_cannot_work_are_refused(packed_dir: Path) -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        make_stream(packed_dir, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="at least one trial"):
        make_stream(packed_dir, sessions=(99,))
    with pytest.raises(ConfigError, match="at least one trial"):
        make_stream(packed_dir, subjects=(8,))
    with pytest.raises(DataError, match="g12"):
        make_stream(packed_dir, targets=("g12",))
    with pytest.raises(ConfigError, match="no target"):
        make_stream(packed_dir, targets=("img",))
    with pytest.raises(DataError, match="data.pictures=all"):  # pictures of test images only are packed
        make_stream(packed_dir, pictures=True)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"subjects": (1, 1)}, "subjects, each once"),
        ({"subjects": ()}, "subjects, each once"),
        ({"targets": ("z", "z")}, "each target once"),
        ({"seed": -1}, "a seed from 0"),
        ({"seed": 2**64}, "a seed from 0"),
        ({"samples_per_subject": 0}, "at least one sample"),
        ({"threads": 0}, "at least one thread"),
        ({"rank": -1}, "0 <= rank"),
        ({"world_size": 0}, "0 <= rank"),
        ({"sessions": ()}, "sessions from 1 on"),
        ({"sessions": (0,)}, "sessions from 1 on"),
        ({"heldout_fraction": 1.5}, "heldout_fraction"),
        ({"split": "validation"}, "train"),
        ({"dtype": "float16"}, "float32 or stored"),
        ({"repeats": "all"}, "trials or mean"),
    ],
)
def test_what_no_stream_can_deliver_is_refused_when_it_is_asked_for(wrong: dict[str, object], named: str) -> None:
    settings = {"subjects": (1,), "targets": ("z",), "samples_per_subject": 6, "seed": 3, **wrong}
    with pytest.raises(ConfigError, match=named):
        StreamConfig(**settings)  # type: ignore[arg-type]
