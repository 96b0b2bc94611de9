from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.format.codec import trial_shard_path
from shards.reading.reader import ShardReader
from shards.reading.trials import open_trials
from tests.shards.support import flip_byte


def test_every_image_of_a_split_comes_once_in_unit_order_with_everything_that_belongs_to_it(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    trials = list(open_trials(reader, [2, 1], targets=("z",), has_pictures=True))
    assert [(trial.subject, trial.image_id) for trial in trials] == [
        (subject, image_id) for subject in (2, 1) for image_id in reader.images(subject, "test")
    ]
    for trial in trials:
        np.testing.assert_array_equal(trial.voxels, reader.voxels(trial.subject, [trial.image_id])[0])
        np.testing.assert_array_equal(trial.targets["z"], reader.targets("z", [trial.image_id])[0])
        assert trial.picture is not None
        np.testing.assert_array_equal(trial.picture, reader.pictures([trial.image_id])[0])
        rows = reader.trials_of(trial.subject)
        assert trial.num_repeats == (rows["image"] == trial.image_id).sum()
    assert {trial.num_repeats for trial in trials} > {3}


def test_sessions_restrict_the_repeats_and_pictures_are_read_on_request_only(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    trials = list(open_trials(reader, [1], "train", sessions=[1]))
    assert [trial.image_id for trial in trials] == reader.images(1, "train", [1])
    assert all(trial.picture is None and trial.targets == {} for trial in trials)


def test_it_is_lazy_and_may_be_left_early(packed_copy: Path) -> None:
    reader = ShardReader(packed_copy)
    rows = reader.trials_of(1)
    last = rows[rows["image"] == reader.images(1, "train")[-1]][0]
    flip_byte(packed_copy / trial_shard_path(1, int(last["session"])), int(last["offset"]))
    assert len(list(islice(open_trials(reader, [1], "train"), 3))) == 3
    with pytest.raises(DataError, match="checksum"):
        list(open_trials(reader, [1], "train"))


def test_what_was_not_packed_is_said_before_the_first_image(packed_dir: Path) -> None:
    reader = ShardReader(packed_dir)
    with pytest.raises(DataError, match="g12"):
        next(open_trials(reader, [1], targets=("g12",)))
    with pytest.raises(DataError, match="Subject 8"):
        next(open_trials(reader, [8]))
