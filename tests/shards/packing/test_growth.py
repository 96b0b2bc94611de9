"""A folder of shards grows: sessions, subjects, targets and pictures come later, and nothing is packed twice."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nd_dist.errors import CheckpointError, DataError
from shards.format.index import Index
from shards.packing.pack import plan_pack
from shards.reading.reader import ShardReader
from shards.reading.selection import StreamConfig
from shards.reading.stream import TrialStream
from shards.sources.nsd_layout import NsdLayout
from shards.upkeep.export_mindeye2 import export
from shards.upkeep.repair import repair
from shards.upkeep.verify import verify
from tests.shards.support import PooledExtractor, flip_byte, folder_bytes, make_config, pack_alone

BETAS = "betas_fithrf_GLMdenoise_RR"
ONE_HOUR = {"max_sessions": 1}
EARLY = {"max_sessions": 2, "max_test_sessions": 2}


def tars(folder: Path) -> dict[str, int]:
    """Return relative path -> time of change of every shard."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.tar")}


def grow(folder: Path, nsd_root: Path, *steps: dict[str, object]) -> Index:
    """Pack one recipe after the other into a folder; what is there already must stay as it is."""
    before: dict[str, int] = {}
    for step in steps:
        index = pack_alone(make_config(nsd_root, folder, **step))
        after = tars(folder)
        assert {name: after.get(name) for name in before} == before
        before = after
        assert verify(folder) == []
    return index


@pytest.mark.parametrize(
    "steps",
    [
        [{"subjects": (1,)}, {"subjects": (1, 2)}, {"subjects": (1, 2, 3)}],
        [{"subjects": (2,)}, {"subjects": (1, 2)}],
        [{"subjects": (2,)}, {"subjects": (1,)}, {"subjects": (3,)}],
        [{"subjects": (1,), **EARLY}, {"subjects": (1,)}],
        [{"subjects": (1,), **ONE_HOUR}, {"subjects": (1,), "max_sessions": 3}, {"subjects": (1,)}],
        [
            {"subjects": (2,), **EARLY},
            {"subjects": (1,)},
            {"subjects": (2,)},
            {"subjects": (1, 2, 3), "targets": ("z",)},
        ],
        [{"targets": ("z",), "pictures": "none"}, {"targets": ("c",), "pictures": "test"}, {"pictures": "all"}],
        [{"subjects": (2,), "targets": ("z",), "pictures": "all"}, {"subjects": (1, 2), "int8_targets": ("z",)}],
        [{"subjects": (2,), "int8_targets": ("z", "c")}, {"subjects": (1, 2, 3), "int8_targets": ("z", "c")}],
        [{"subjects": (1,), **ONE_HOUR, "targets": ("z",)}, {"subjects": (1, 3), "targets": ("z", "c")}],
    ],
)
def test_a_folder_grows_and_what_it_holds_is_what_one_pack_holds(
    phantom_dir: Path, tmp_path: Path, steps: list[dict[str, object]]
) -> None:
    index = grow(tmp_path / "grown", phantom_dir, *steps)
    subjects = tuple(sorted({s for step in steps for s in step.get("subjects", (1, 2, 3))}))
    all_at_once = {"subjects": subjects, "pictures": "all", "int8_targets": ("z", "c")}
    whole = pack_alone(make_config(phantom_dir, tmp_path / "whole", **all_at_once))
    grown, expected = ShardReader(tmp_path / "grown"), ShardReader(tmp_path / "whole")
    columns = ["subject", "session", "repeat", "split", "trial", "image", "checksum"]
    np.testing.assert_array_equal(grown.trials[columns], expected.trials[columns])
    for store in ("z", "c"):
        if store in index.features and len(steps[-1].get("subjects", subjects)) == len(subjects):
            mine, theirs = grown.store(store), expected.store(store)
            present = mine["shard"] != 0xFFFFFFFF
            np.testing.assert_array_equal(mine["checksum"][present], theirs["checksum"][present])
    assert whole.subjects.keys() == index.subjects.keys()


def test_adding_a_session_writes_its_own_shards_only(phantom_dir: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "shards", {"subjects": (1,), "pictures": "all"}
    pack_alone(make_config(phantom_dir, folder, max_sessions=3, **settings))
    before = tars(folder)
    extractor = PooledExtractor()
    index = pack_alone(make_config(phantom_dir, folder, **settings), extractor)
    new = set(tars(folder)) - set(before)
    assert {name for name in new if name.startswith("trials/")} == {"trials/subj01/nsd-s01-e04.tar"}
    packed = set(np.unique(index.trials["image"][index.trials["session"] < 4]).tolist())
    tests = set(np.unique(index.trials["image"][index.trials["split"] == 1]).tolist())
    extracted = [image_id for batch in extractor.batches for image_id in batch]
    assert set(extracted) == set(np.unique(index.trials["image"]).tolist()) - packed - tests
    assert index.subjects[1].sessions == 4


def test_a_shorter_list_keeps_what_is_there_and_a_longer_one_finds_it(packed_copy: Path, phantom_dir: Path) -> None:
    before = folder_bytes(packed_copy)
    for shorter in (
        {"targets": ("g02",)},
        {"subjects": (1,)},
        {"pictures": "none"},
        ONE_HOUR,
        {"targets": (), "subjects": (3,)},
    ):
        extractor = PooledExtractor()
        pack_alone(make_config(phantom_dir, packed_copy, **shorter), extractor)
        assert folder_bytes(packed_copy) == before
        assert extractor.batches == []


@pytest.mark.parametrize(
    "name", ["trials/subj02/nsd-s02-e03", "features/c/nsd-c-s01-000", "features/img/nsd-img-shared-000"]
)
def test_a_shard_that_is_listed_and_gone_is_packed_again_by_a_recipe_that_does_not_ask_for_it(
    packed_copy: Path, phantom_dir: Path, name: str
) -> None:
    before = folder_bytes(packed_copy)
    (packed_copy / f"{name}.tar").unlink()
    pack_alone(make_config(phantom_dir, packed_copy, subjects=(1,), targets=("z",), pictures="none"))
    assert folder_bytes(packed_copy) == before


def test_a_grown_folder_is_repaired_to_the_same_bytes(phantom_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    grow(folder, phantom_dir, {"subjects": (2,)}, {"subjects": (1, 2)}, {"subjects": (3,), "targets": ("z",)})
    before = folder_bytes(folder)
    damaged = sorted(path for path in folder.rglob("*.tar"))[::3]
    for path in damaged:
        flip_byte(path, 700)
    assert len(repair(folder)) == len(damaged)
    assert len(list(folder.rglob("*.damaged"))) == len(damaged)
    pack_alone(make_config(phantom_dir, folder, subjects=(3,), targets=("z",)))
    assert folder_bytes(folder) == before


def test_a_growth_that_was_interrupted_anywhere_goes_on_to_the_same_folder(phantom_dir: Path, tmp_path: Path) -> None:
    first, second = {"subjects": (2,)}, {"subjects": (1, 2, 3)}
    grow(tmp_path / "whole", phantom_dir, first, second)
    whole = folder_bytes(tmp_path / "whole")
    pack_alone(make_config(phantom_dir, tmp_path / "small", **first))
    new = sorted(set(tars(tmp_path / "whole")) - set(tars(tmp_path / "small")))
    assert len(new) > 10
    for keep in (new[::2], new[1::2], new[-1:]):
        folder = tmp_path / f"torn-{len(keep)}-{keep[0].replace('/', '-')}"
        shutil.copytree(tmp_path / "small", folder)
        for name in keep:  # finished by ranks that were quicker
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "whole" / name, folder / name)
            receipt = f".pack/{Path(name).name}.json"
            shutil.copy(tmp_path / "whole" / receipt, folder / receipt)
        pack_alone(make_config(phantom_dir, folder, **second))
        assert folder_bytes(folder) == whole


def test_a_packer_that_was_killed_while_it_wrote_the_index_forgets_nothing(
    packed_copy: Path, phantom_dir: Path
) -> None:
    before = folder_bytes(packed_copy)
    (packed_copy / "index.json").rename(packed_copy / ".pack/previous.json")
    (packed_copy / "index/z.npy").unlink()
    pack_alone(make_config(phantom_dir, packed_copy, subjects=(1,), targets=("g02",)))
    assert folder_bytes(packed_copy) == before


def test_a_damaged_index_is_written_again_from_everything_that_is_whole(packed_copy: Path, phantom_dir: Path) -> None:
    before = folder_bytes(packed_copy)
    flip_byte(packed_copy / "index.json", 600)
    pack_alone(make_config(phantom_dir, packed_copy, subjects=(1,), targets=("g02",)))
    after = folder_bytes(packed_copy)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {"index.json"}
    index = Index.read(packed_copy)
    assert sorted(index.subjects) == [1, 2, 3]
    assert sorted(index.features) == ["c", "g02", "img", "z"]
    assert index.subjects[2].source["roi"] == "nsdgeneral"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalization": "mindeye1"}, "normalization"),
        ({"voxel_dtype": "float32"}, "voxel_dtype"),
        ({"roi": "prf-visualrois"}, "roi"),
        ({"target_dtype": "float32", "targets": ("g02",)}, "target_dtype"),
    ],
)
def test_more_of_another_recipe_is_refused(
    phantom_dir: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    folder = tmp_path / "shards"
    pack_alone(make_config(phantom_dir, folder, subjects=(1,), targets=("z",)))
    before = folder_bytes(folder)
    with pytest.raises(DataError, match="other settings") as caught:
        pack_alone(make_config(phantom_dir, folder, **{"subjects": (3,), "targets": (), **change}))
    assert named in str(caught.value)
    assert folder_bytes(folder) == before


def test_a_z_scoring_over_all_sessions_cannot_grow_by_sessions_and_says_why(phantom_dir: Path, tmp_path: Path) -> None:
    settings = {"normalization": "brain-diffuser", "subjects": (1,), "targets": ()}
    pack_alone(make_config(phantom_dir, tmp_path / "s", **EARLY, **settings))
    with pytest.raises(DataError, match="expected: sessions: 4(.|\n)*found: sessions: 2"):
        pack_alone(make_config(phantom_dir, tmp_path / "s", **settings))
    index = pack_alone(make_config(phantom_dir, tmp_path / "s", **{**EARLY, **settings, "subjects": (1, 3)}))
    assert sorted(index.subjects) == [1, 3]
    assert verify(tmp_path / "s") == []


def test_other_trials_under_a_sessions_name_are_refused(phantom_copy: Path, tmp_path: Path) -> None:
    import scipy.io

    config = make_config(phantom_copy, tmp_path / "shards", subjects=(1,), targets=())
    pack_alone(config)
    receipt = tmp_path / "shards/.pack/nsd-s01-e02.tar.json"
    text = receipt.read_text()
    layout = NsdLayout(phantom_copy)
    content = {k: v for k, v in scipy.io.loadmat(layout.expdesign).items() if not k.startswith("_")}
    order = content["masterordering"].ravel()
    order[[20, 21]] = order[[21, 20]]
    content["masterordering"] = order
    scipy.io.savemat(layout.expdesign, content)
    layout.responses(1).unlink()
    digest = "expdesign_sha256"
    from nd_dist.files import sha256_file

    old = text.split(f'"{digest}": "')[1][:64]
    for path in (tmp_path / "shards/.pack").glob("*.json"):  # as if the design had no hash of its own
        path.write_text(path.read_text().replace(old, sha256_file(layout.expdesign)))
    with pytest.raises(DataError, match="other data(.|\n)*trials: 15 from 15 on"):
        pack_alone(config)


@pytest.mark.parametrize("reader", ["nsd", "mindeye2"])
def test_one_hour_means_sessions_to_train_on_and_the_test_set_stays_complete(
    phantom_dir: Path, tmp_path: Path, reader: str
) -> None:
    root = phantom_dir
    if reader == "mindeye2":
        pack_alone(make_config(phantom_dir, tmp_path / "all", pictures="all", targets=(), voxel_dtype="float32"))
        export(ShardReader(tmp_path / "all"), root := tmp_path / "me2")
        for number in (1, 2, 3):
            (root / f"wds/subj01/train/{number}.tar").unlink()
    settings = {"reader": reader, "subjects": (1,), "targets": ("z",), "voxel_dtype": "float32"}
    index = pack_alone(make_config(root, tmp_path / "hour", **ONE_HOUR, **settings))
    assert verify(tmp_path / "hour") == []
    info = index.subjects[1]
    assert (info.sessions, info.test_images, info.test_trials, info.shown_test_images) == (1, 4, 12, 4)
    hour = ShardReader(tmp_path / "hour")
    assert set(hour.trials["session"][hour.trials["split"] == 0]) == {1}
    if reader == "nsd":
        whole = pack_alone(make_config(root, tmp_path / "whole", **settings))
        tests = whole.trials[whole.trials["split"] == 1]
        names = ["trial", "image", "repeat", "session", "checksum"]
        np.testing.assert_array_equal(hour.trials[hour.trials["split"] == 1][names], tests[names])


def test_an_hour_packs_from_one_sessions_betas_and_says_what_is_left(phantom_copy: Path, tmp_path: Path) -> None:
    for session in (2, 3, 4):
        for suffix in (".hdf5", ".nii.gz"):
            NsdLayout(phantom_copy).betas(1, BETAS, session, suffix).unlink()
    config = make_config(phantom_copy, tmp_path / "s", subjects=(1,), targets=(), **ONE_HOUR)
    info = pack_alone(config).subjects[1]
    assert info.test_images < info.shown_test_images == 4
    assert verify(tmp_path / "s") == []


def test_whoever_restricts_the_test_set_says_so_and_the_index_tells_it(phantom_dir: Path, tmp_path: Path) -> None:
    info = pack_alone(make_config(phantom_dir, tmp_path / "s", subjects=(1,), targets=(), **EARLY)).subjects[1]
    assert (info.sessions, info.trials) == (2, 30)
    assert info.test_images <= info.shown_test_images == 4
    assert info.test_trials < 12
    for wrong in ({"max_test_sessions": 2}, {"max_sessions": 3, "max_test_sessions": 2}):
        with pytest.raises(ValueError, match="max_test_sessions"):
            make_config(phantom_dir, tmp_path / "s", **wrong)


def test_what_a_training_reads_keeps_its_identity_however_the_folder_grew(phantom_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    ids = []
    for step in (
        {"subjects": (2,), "targets": ("z",)},
        {"subjects": (1, 2)},
        {"int8_targets": ("z",)},
        {"pictures": "all"},
    ):
        index = pack_alone(make_config(phantom_dir, folder, **step))
        ids.append((index.content_id((2,), ("z",)), index.id))
    assert len({content for content, _ in ids}) == 1
    assert len({whole for _, whole in ids}) == 4
    index = Index.read(folder)
    assert index.content_id((2,), ("z",)) == ids[0][0]
    others = {
        index.content_id(*asked) for asked in (((1,), ("z",)), ((2,), ("c",)), ((2,), ("z8",)), ((2,), ("z",), (1,)))
    }
    assert len(others | {ids[0][0]}) == 5
    hours = []
    for more in (ONE_HOUR, {"max_sessions": 3}, {}):
        index = pack_alone(make_config(phantom_dir, tmp_path / "hour", subjects=(1,), targets=("z",), **more))
        hours.append((index.content_id((1,), ("z",), (1,)), index.content_id((1,), ("z",))))
    assert len({one for one, _ in hours}) == 1, "a training on one session goes on"
    assert len({every for _, every in hours}) == 3, "one on all sessions would read other trials"


def test_a_stream_goes_on_exactly_after_the_folder_grew(phantom_dir: Path, tmp_path: Path) -> None:
    folder, wanted = tmp_path / "shards", StreamConfig((2,), ("z",), 4, 3)

    def batches(count: int, state: dict[str, object] | None = None) -> tuple[list[bytes], dict[str, object]]:
        with TrialStream(ShardReader(folder), wanted) as stream:
            if state is not None:
                stream.load_state_dict(state)
            found = [batch.voxels[2].numpy().tobytes() for batch in islice(stream, count)]
            return found, stream.state_dict()

    pack_alone(make_config(phantom_dir, folder, subjects=(2,), targets=("z",)))
    whole, _ = batches(9)
    begun, state = batches(4)
    pack_alone(make_config(phantom_dir, folder, subjects=(1, 2, 3), targets=("z", "c"), int8_targets=("z",)))
    rest, _ = batches(5, state)
    assert begun + rest == whole


def test_a_stream_of_one_session_goes_on_after_more_sessions_and_one_of_all_is_refused(
    phantom_dir: Path, tmp_path: Path
) -> None:
    folder, settings = tmp_path / "shards", {"subjects": (1,), "targets": ("z",)}
    wishes = [StreamConfig((1,), ("z",), 4, 3, sessions=sessions) for sessions in ((1,), None)]
    pack_alone(make_config(phantom_dir, folder, **ONE_HOUR, **settings))
    states = [TrialStream(ShardReader(folder), wish).state_dict() for wish in wishes]
    pack_alone(make_config(phantom_dir, folder, **settings))
    hour, every = (TrialStream(ShardReader(folder), wish) for wish in wishes)
    hour.load_state_dict(states[0])
    with pytest.raises(CheckpointError, match="not the data of the checkpoint"):
        every.load_state_dict(states[1])


def test_the_plan_of_a_folder_that_holds_something_tells_what_will_be_there(phantom_dir: Path, tmp_path: Path) -> None:
    pack_alone(make_config(phantom_dir, tmp_path / "s", subjects=(2,)))
    config = make_config(phantom_dir, tmp_path / "s", subjects=(1, 2))
    planned = {shard.path for shard in plan_pack(config, PooledExtractor.specs).shards}
    index = pack_alone(config)
    assert planned == {shard.path for shard in index.shards}


def test_a_packer_needs_no_subject_to_train_for(phantom_dir: Path, tmp_path: Path) -> None:
    from launch.recipe import load_recipe
    from nd_dist.errors import ConfigError

    words = ["data.subjects=[2]", f"nsd_root={phantom_dir}", f"shards_dir={tmp_path / 's'}"]
    assert load_recipe("paper", words, "pack").data.subjects == (2,)
    for command in ("train", "evaluate", "sweep", ""):
        with pytest.raises(ConfigError, match=r"subjects \[1\] are not in data.subjects \[2\]"):
            load_recipe("paper", words, command)
    assert load_recipe("paper", [*words, "training.target_subject=2", "evaluation.subjects=[7]"], "train")
    with pytest.raises(ConfigError, match=r"subjects \[7\]"):
        load_recipe("paper", [*words, "training.target_subject=2", "evaluation.subjects=[7]"], "evaluate")
