from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from nd_dist.errors import DataError
from shards.reading.reader import ShardReader
from shards.sources.mindeye2 import MindEye2Reader
from shards.sources.open import open_reader
from shards.upkeep.export_mindeye2 import behaviour, export
from shards.upkeep.verify import verify
from tests.shards.support import folder_bytes, make_config, pack_alone


@pytest.fixture(scope="module")
def complete(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """The phantom packed with all pictures and single precision."""
    folder = tmp_path_factory.mktemp("complete") / "shards"
    pack_alone(make_config(phantom_dir, folder, pictures="all", voxel_dtype="float32", targets=("z",)))
    return ShardReader(folder)


def test_what_is_exported_reads_as_mindeye2s_layout_and_is_what_was_packed(
    complete: ShardReader, phantom_dir: Path, tmp_path: Path
) -> None:
    summary = export(complete, tmp_path / "out")
    assert summary.has_pictures
    assert all((tmp_path / "out" / path).is_file() for path in summary.files)
    config = make_config(tmp_path / "out", tmp_path / "again", reader="mindeye2", targets=("z",))
    exported, source = open_reader(config), open_reader(make_config(phantom_dir, tmp_path / "x"))
    assert isinstance(exported, MindEye2Reader)
    for subject in (1, 2, 3):
        found, expected = exported.design(subject), source.design(subject)
        for name in ("session", "image_id", "is_test", "repeat"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        rows = complete.trials_of(subject, [2])
        record = np.empty((len(rows), complete.num_voxels[subject]), dtype="<f4")
        complete.read_voxels(rows, record)
        np.testing.assert_array_equal(exported.read_session(subject, 2), record)
    image_ids = complete.images(1, "test")
    small = exported.pictures(image_ids)
    assert small.shape == (len(image_ids), 224, 224, 3)
    means = source.pictures(image_ids).mean(axis=(1, 2))
    np.testing.assert_allclose(small.mean(axis=(1, 2)), means, atol=2.5)


def test_exported_files_pack_again_and_prove_themselves(complete: ShardReader, tmp_path: Path) -> None:
    export(complete, tmp_path / "out")
    config = make_config(tmp_path / "out", tmp_path / "again", reader="mindeye2", targets=("z",))
    pack_alone(config)
    assert verify(tmp_path / "again") == []
    again = ShardReader(tmp_path / "again")
    ids = complete.images(2, "train")
    np.testing.assert_allclose(again.voxels(2, ids), complete.voxels(2, ids), atol=4e-3)


def test_neighbours_stay_in_their_session_and_unknown_values_are_minus_one(
    complete: ShardReader, tmp_path: Path
) -> None:
    import webdataset

    export(complete, tmp_path / "out", subjects=[1])
    rows = complete.trials_of(1)
    values = behaviour(rows)
    assert (values[:, [3, 4, 6, 9, 15]] == -1).all()
    assert values[:, 16].sum() == (rows["split"] == 1).sum()
    samples = list(webdataset.WebDataset(str(tmp_path / "out/wds/subj01/train/1.tar"), shardshuffle=False).decode())
    assert samples
    for sample in samples:
        trial = int(sample["behav.npy"][0, 5])
        session = int(sample["behav.npy"][0, 2])
        assert session == 2
        for name, step in (("past", -1), ("future", 1)):
            near = sample[f"{name}_behav.npy"]
            assert near.shape == (15, 17)
            known = near[near[:, 5] >= 0]
            assert (known[:, 2] == session).all()
            assert known[:, 5].tolist() == [trial + step * (k + 1) for k in range(len(known))]
        olds = sample["olds_behav.npy"]
        assert olds.shape == (3, 17)
        same = np.flatnonzero(rows["image"] == sample["behav.npy"][0, 0])
        others = same[same != trial].tolist()
        assert olds[:, 5].tolist() == [*others, *[-1] * (3 - len(others))], "before and after, in order"


def test_exporting_again_keeps_the_files_and_other_folders_are_refused(
    complete: ShardReader, packed_dir: Path, tmp_path: Path
) -> None:
    export(complete, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    export(complete, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == before
    with pytest.raises(DataError, match="not empty"):
        export(ShardReader(packed_dir), tmp_path / "out")


def test_without_all_pictures_there_is_no_picture_file(packed_dir: Path, tmp_path: Path) -> None:
    summary = export(ShardReader(packed_dir), tmp_path / "out", subjects=[3])
    assert not summary.has_pictures
    assert not list((tmp_path / "out").glob("coco*"))
    with h5py.File(tmp_path / "out/betas_all_subj03_fp32_renorm.hdf5") as file:
        assert file["betas"].dtype == np.float32
    assert np.load(tmp_path / "out/shared1000.npy").sum() == len(ShardReader(packed_dir).images(1, "test"))
