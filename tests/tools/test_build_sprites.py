from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from nd_dist.files import read_json
from shards.phantom.sprites import DATA_DIR, sprites
from tools import build_sprites
from tools.build_sprites import SPRITE_SIZE, Selection, build, shrink


def picture(color: tuple[int, int, int], box: tuple[int, int, int, int]) -> bytes:
    image = Image.new("RGBA", (256, 256))
    image.paste((*color, 255), box)
    stream = io.BytesIO()
    image.save(stream, "webp", lossless=True)
    return stream.getvalue()


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_sprite_is_cropped_to_what_is_opaque_scaled_to_fit_and_centred() -> None:
    rgba = shrink(picture((200, 10, 30), (100, 50, 140, 130)))
    assert rgba.shape == (SPRITE_SIZE, SPRITE_SIZE, 4)
    opaque = rgba[..., 3] > 128
    assert opaque.any(axis=1).all()
    columns = np.flatnonzero(opaque.any(axis=0))
    assert 22 <= len(columns) <= 26
    assert abs(columns.mean() - (SPRITE_SIZE - 1) / 2) <= 1
    assert (rgba[rgba[..., 3] == 0] == 0).all()


def test_building_a_pack_keeps_the_selected_things_under_their_new_names(tmp_path: Path) -> None:
    labels = [
        {"label": "tiger", "hexcode": "1F405", "subgroup": 1},
        {"label": "tiger face", "hexcode": "1F42F", "subgroup": 1},
        {"label": "locked", "hexcode": "1F512-FE0F", "subgroup": 2},
        {"label": "flag: Peru", "hexcode": "1F1F5", "subgroup": 3},
    ]
    groups = {"subgroups": {"1": "animal-mammal", "2": "lock", "3": "country-flag"}}
    content = {
        "package/en/data.json": json.dumps(labels).encode(),
        "package/meta/groups.json": json.dumps(groups).encode(),
    }
    names = write_archive(tmp_path / "names.tgz", content)
    stems = ("1f405", "1f42f", "1f512", "1f1f5")
    files = {f"package/assets/{stem}.webp": picture((9, 9, 9), (0, 0, 256, 256)) for stem in stems}
    pictures = write_archive(tmp_path / "pictures.tgz", files)
    assert build(pictures, names, tmp_path / "out") == 2
    things = read_json(tmp_path / "out" / "sprites.json")["things"]
    assert [thing["name"] for thing in things] == ["tiger", "padlock"]
    assert things[1]["source"] == "assets/1f512.webp"
    with np.load(tmp_path / "out" / "sprites.npz", allow_pickle=False) as pack:
        assert pack["rgba"].shape == (2, SPRITE_SIZE, SPRITE_SIZE, 4)


def test_the_selection_only_names_super_classes_that_the_shipped_pack_has() -> None:
    selection = Selection(**read_json(DATA_DIR / "selection.json"))
    assert set(selection.super_class.values()) == {sprite.super_class for sprite in sprites()}
    assert set(selection.only) <= set(selection.super_class)
    assert sprites()[0].rgba.shape[0] == build_sprites.SPRITE_SIZE
