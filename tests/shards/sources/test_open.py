from __future__ import annotations

from pathlib import Path

import pytest

from nd_dist.config import DataConfig
from nd_dist.errors import ConfigError, DataError
from shards.sources.nsd import NsdReader
from shards.sources.open import open_reader
from tests.shards.support import make_config


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
