from __future__ import annotations

from pathlib import Path

import pytest

from nd_dist.config import DataConfig
from nd_dist.errors import ConfigError, DataError
from shards.reading.reader import ShardReader
from shards.sources.mindeye2 import EXPORT_RECORD
from shards.sources.nsd import NsdReader
from shards.sources.nsd_layout import PHANTOM_RECORD
from shards.sources.open import open_reader
from shards.upkeep.export_mindeye2 import export
from tests.shards.support import make_config, pack_alone


class ReaderOfAFriend(NsdReader):
    """A reader of another package."""


class NotAReader:
    @classmethod
    def open(cls, config: object) -> NotAReader:
        return cls()


def test_a_reader_is_named_by_module_and_class(phantom_dir: Path) -> None:
    reader = open_reader(make_config(phantom_dir, phantom_dir, reader=f"{__name__}:ReaderOfAFriend"))
    assert isinstance(reader, ReaderOfAFriend)
    assert reader.design(1).num_trials == 60


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no_such_module:Reader", "no_such_module"),
        (f"{__name__}:Missing", "Missing"),
        (f"{__name__}:NotAReader", "read_session"),
    ],
)
def test_a_reader_that_cannot_be_had_is_said(phantom_dir: Path, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        open_reader(make_config(phantom_dir, phantom_dir, reader=name))


def test_other_words_are_no_reader() -> None:
    for name in ("nsds", "a b:C", "a:B:C", ":C", "a:"):
        with pytest.raises(ValueError, match="reader"):
            DataConfig(reader=name)


@pytest.mark.parametrize(
    ("sign", "reader", "named"),
    [
        ("nsddata/x", "mindeye2", "set data.reader=nsd"),
        ("wds/subj01/train/0.tar", "nsd", "set data.reader=mindeye2"),
        ("betas_all_subj01_fp32_renorm.hdf5", "nsd", "set data.reader=mindeye2"),
        ("webdataset_avg_split/train/train_subj01_0.tar", "mindeye2", "MindEye1's are not read"),
        ("train/train_subj01_0.tar", "mindeye2", "MindEye1's are not read"),
        ("webdataset_avg_split/metadata_subj01.json", "nsd", "MindEye1's are not read"),
    ],
)
def test_a_folder_of_another_layout_is_recognised(tmp_path: Path, sign: str, reader: str, named: str) -> None:
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sign).write_bytes(b"x")
    with pytest.raises(DataError, match=named):
        open_reader(make_config(tmp_path, tmp_path / "shards", reader=reader))


def test_a_source_says_whether_its_data_are_made_up_and_packing_and_export_keep_it(
    phantom_copy: Path, tmp_path: Path
) -> None:
    settings = {"subjects": (1,), "targets": (), "voxel_dtype": "float32"}
    made_up = pack_alone(make_config(phantom_copy, tmp_path / "a", pictures="all", **settings))
    export(ShardReader(tmp_path / "a"), tmp_path / "me2")
    again = pack_alone(make_config(tmp_path / "me2", tmp_path / "b", reader="mindeye2", **settings))
    assert (made_up.is_simulated, again.is_simulated) == (True, True)
    (phantom_copy / PHANTOM_RECORD).unlink()  # as if these were a scanner's files, few as they are
    (tmp_path / "me2" / EXPORT_RECORD).unlink()
    assert pack_alone(make_config(phantom_copy, tmp_path / "c", **settings)).is_simulated is False
    real = pack_alone(make_config(tmp_path / "me2", tmp_path / "d", reader="mindeye2", **settings))
    assert real.is_simulated is False
