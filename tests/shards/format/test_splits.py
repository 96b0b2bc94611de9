"""Named splits, groups and duplicates of a data set, from its reader to what is trained and tested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nd_dist.comm import Comm
from nd_dist.errors import ConfigError, DataError
from nd_dist.events import EventLog
from shards.format.index import Index
from shards.format.splits import choose_split, image_groups, representatives
from shards.packing.pack import pack_from
from shards.reading.as_webdataset import as_webdataset
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from shards.sources.contract import ImageSets, SplitImages
from shards.sources.open import open_reader
from shards.upkeep.verify import verify
from tests.shards.support import PooledExtractor, make_config

SUBJECTS = (1, 2)


def ids(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def pack_with(sets: ImageSets, phantom_dir: Path, folder: Path, **data: Any) -> Index:
    """Pack the small phantom as if its reader had declared sets of images."""
    config = make_config(phantom_dir, folder, **{"subjects": SUBJECTS, "targets": ("z",), **data})
    reader: Any = open_reader(config)
    reader.image_sets = sets
    return pack_from(reader, config, Comm(), EventLog(config.run_dir, 0, "pack"), PooledExtractor())


@pytest.fixture(scope="module")
def seen(packed_dir: Path) -> dict[int, list[int]]:
    """Subject -> all images that it saw, ascending."""
    trials = Index.read(packed_dir).trials
    return {s: np.unique(trials["image"][trials["subject"] == s]).tolist() for s in SUBJECTS}


@pytest.fixture(scope="module")
def sets(seen: dict[int, list[int]]) -> ImageSets:
    """Split `mixed`: each subject tests another of the images that both saw, and some of its own."""
    both = sorted(set(seen[1]) & set(seen[2]))
    own = {s: [i for i in seen[s] if i not in both] for s in SUBJECTS}
    tests = {1: [both[0], *own[1][:3]], 2: [both[1], *own[2][:3]]}
    mixed = {s: SplitImages(ids([i for i in seen[s] if i not in tests[s]]), ids(tests[s])) for s in SUBJECTS}
    return ImageSets(
        splits={"mixed": mixed, "of 1 alone": {1: mixed[1]}},
        groups={"low": seen[1][:5], "first": both[:1]},
        duplicates=[(own[1][0], own[1][5]), (own[1][5], own[2][7])],
        source={"mixed.json": "1234"},
    )


@pytest.fixture(scope="module")
def split_dir(sets: ImageSets, phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits") / "shards"
    pack_with(sets, phantom_dir, folder)
    return folder


def test_the_index_keeps_what_the_data_set_declares(split_dir: Path, sets: ImageSets) -> None:
    index = Index.read(split_dir)
    assert index.splits == ("mixed", "of 1 alone")
    assert index.source["image_sets"] == {"mixed.json": "1234"}
    assert image_groups(index) == {name: tuple(sorted(found)) for name, found in sets.groups.items()}
    assert verify(split_dir) == []


def test_shards_of_a_data_set_without_sets_are_what_they_were(packed_dir: Path) -> None:
    index = Index.read(packed_dir)
    content = (packed_dir / "index.json").read_text()
    assert not any(word in content for word in ('"splits"', '"groups"', '"name"', '"image_sets"'))
    assert choose_split(index, "own", SUBJECTS) is index


def test_a_split_says_what_is_trained_and_what_is_tested(split_dir: Path, sets: ImageSets) -> None:
    reader = ShardReader.over(choose_split(Index.read(split_dir), "mixed", (1,)))
    expected = sets.splits["mixed"][1]
    assert reader.images(1, "test") == sorted(expected.test.tolist())
    alike = {sets.duplicates[0][1]}  # shows the same as an image that is tested
    assert reader.images(1, "train") == sorted(set(expected.train.tolist()) - alike)
    assert reader.images(2, "train") == reader.images(2, "test") == []


@pytest.mark.parametrize("name", ["own", "mixed"])
def test_nothing_that_is_tested_for_one_subject_is_trained_on_for_another(name: str, split_dir: Path) -> None:
    index = choose_split(Index.read(split_dir), name, SUBJECTS)
    reader, same = ShardReader.over(index), representatives(index)
    tested = {same[i] for subject in SUBJECTS for i in reader.images(subject, "test")}
    trained = [same[i] for subject in SUBJECTS for i in reader.images(subject, "train")]
    assert tested
    assert trained
    assert not tested & set(trained)


def test_a_subject_keeps_training_images_that_only_a_subject_outside_the_recipe_tests(
    split_dir: Path, sets: ImageSets
) -> None:
    index, of_2 = Index.read(split_dir), int(sets.splits["mixed"][2].test[0])
    alone = ShardReader.over(choose_split(index, "mixed", (1,))).images(1, "train")
    together = ShardReader.over(choose_split(index, "mixed", SUBJECTS)).images(1, "train")
    assert of_2 in alone
    assert of_2 not in together


def test_streams_and_stock_webdataset_follow_the_split(split_dir: Path) -> None:
    index = choose_split(Index.read(split_dir), "mixed", SUBJECTS)
    reader = ShardReader.over(index)
    for split in ("train", "test"):
        wanted = {(s, i) for s in SUBJECTS for i in reader.images(s, split)}
        sampled = {(s["subject"], s["image_id"]) for s in as_webdataset(index, split)}
        assert sampled == wanted
        config = StreamConfig(subjects=(1,), targets=("z",), samples_per_subject=5, seed=0, split=split)
        with TrialStream(reader, config) as stream:
            drawn = {i for _ in range(stream.steps_per_pass) for i in next(stream).image_id.tolist()}
        assert drawn == set(reader.images(1, split))


def test_images_that_show_the_same_are_held_out_together(split_dir: Path, sets: ImageSets) -> None:
    reader = ShardReader.over(choose_split(Index.read(split_dir), "own", SUBJECTS))
    one, other, of_2 = sets.duplicates[0][0], *sets.duplicates[1]
    sides = set()
    for fraction in np.linspace(0.05, 0.95, 19):
        held = {s: set(reader.heldout_images(s, float(fraction))) for s in SUBJECTS}
        assert (one in held[1]) == (other in held[1]) == (of_2 in held[2])
        sides.add(one in held[1])
    assert sides == {False, True}


def test_a_planted_leak_is_found_before_the_index_is_written(
    phantom_dir: Path, tmp_path: Path, seen: dict[int, list[int]]
) -> None:
    leaky = ImageSets(splits={"bad": {1: SplitImages(ids(seen[1][:9]), ids(seen[1][8:]))}})
    with pytest.raises(DataError, match=f"(?s)trains on images that it tests.*1 images, e.g. {seen[1][8]}"):
        pack_with(leaky, phantom_dir, tmp_path / "shards")
    assert not Index.exists(tmp_path / "shards")


def test_an_unknown_split_names_those_that_there_are(split_dir: Path) -> None:
    index = Index.read(split_dir)
    with pytest.raises(ConfigError, match="(?s)no split 'tau'.*own, mixed, of 1 alone"):
        choose_split(index, "tau", SUBJECTS)
    with pytest.raises(ConfigError, match="says nothing of subject 2"):
        choose_split(index, "of 1 alone", SUBJECTS)


def test_a_folder_that_grows_gets_the_splits_of_today_and_packs_nothing_again(
    phantom_dir: Path, tmp_path: Path, sets: ImageSets
) -> None:
    folder = tmp_path / "shards"
    pack_with(ImageSets(), phantom_dir, folder, subjects=(1,))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    index = pack_with(sets, phantom_dir, folder, subjects=(1,))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")} == before
    assert index.splits == ("mixed", "of 1 alone")
