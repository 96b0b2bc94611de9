from __future__ import annotations

from pathlib import Path

import pytest

from launch.pack_recipe import pack_recipe_path, read_pack_recipe, write_pack_recipe
from nd_dist.config import Config
from nd_dist.errors import DataError


def config_of(folder: Path, **changes: object) -> Config:
    place = {"nsd_root": folder / "nsd", "shards_dir": folder / "shards", "run_dir": folder / "run"}
    (folder / "nsd").mkdir(exist_ok=True)
    return Config.model_validate({**place, **changes})


def test_what_is_kept_is_read_back_with_the_data_set_beside_the_shards(tmp_path: Path) -> None:
    data = {"subjects": (2, 5), "normalization": "brain-diffuser", "captions": str(tmp_path / "nsd/words")}
    config = config_of(tmp_path, data=data, training={"target_subject": 5}, frozen={"batch_size": 7}, model="a/name")
    write_pack_recipe(config)
    text = pack_recipe_path(tmp_path / "shards").read_text()
    assert str(tmp_path) not in text
    found = read_pack_recipe(tmp_path / "shards")
    assert (found.nsd_root, found.shards_dir) == (tmp_path / "nsd", tmp_path / "shards")
    assert (found.data, found.frozen, found.model) == (config.data, config.frozen, "a/name")


def test_a_tree_that_moved_as_a_whole_needs_no_word(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write_pack_recipe(config_of(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_pack_recipe(tmp_path / "new/shards").nsd_root == tmp_path / "new/nsd"


def test_a_folder_elsewhere_is_left_out_and_has_to_be_given(tmp_path: Path) -> None:
    elsewhere = tmp_path / "a/b/secret-name"
    elsewhere.mkdir(parents=True)
    write_pack_recipe(config_of(tmp_path, model=str(elsewhere), shards_dir=tmp_path / "c/d/shards"))
    shards = tmp_path / "c/d/shards"
    assert "secret-name" not in pack_recipe_path(shards).read_text()
    with pytest.raises(DataError, match="--repair nsd_root=FOLDER"):
        read_pack_recipe(shards)
    with pytest.raises(DataError, match="--repair model=FOLDER"):
        read_pack_recipe(shards, [f"nsd_root={tmp_path / 'nsd'}"])
    found = read_pack_recipe(shards, [f"nsd_root={tmp_path / 'nsd'}", f"model={elsewhere}"])
    assert (found.nsd_root, found.model) == (tmp_path / "nsd", str(elsewhere))
    assert found.data.captions == str(tmp_path / "nsd/captions")


@pytest.mark.parametrize("content", ["", "nsd_root: [", "- a", "nsd_root: ../nsd", "\x00"])
def test_a_damaged_recipe_is_said(tmp_path: Path, content: str) -> None:
    write_pack_recipe(config_of(tmp_path))
    pack_recipe_path(tmp_path / "shards").write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_pack_recipe(tmp_path / "shards")
